"""What a run did: figures, text, pictures."""
