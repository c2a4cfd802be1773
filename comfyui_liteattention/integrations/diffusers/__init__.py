"""diffusers. Imported only when one of its functions is used, since all of it imports diffusers."""
