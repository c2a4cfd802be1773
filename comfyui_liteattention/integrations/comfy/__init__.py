"""ComfyUI. Imported by its nodes alone: everything here imports the host."""
