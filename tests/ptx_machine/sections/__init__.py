"""Cases by subject: each section takes a card and yields its cases."""
