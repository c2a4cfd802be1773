"""diffusers. Imported when one of its functions is used: everything here imports the host."""
