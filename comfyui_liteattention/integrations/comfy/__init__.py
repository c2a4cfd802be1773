"""ComfyUI. Imported only by our nodes, since everything here imports ComfyUI itself."""
