"""A CPU stand-in for the GPU: runs the PTX that NVRTC makes of our kernels, and checks what a GPU would not tell."""
