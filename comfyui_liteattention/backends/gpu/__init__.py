"""Graphics cards: prebuilt kernels launched through the driver, or the same ones through triton."""
