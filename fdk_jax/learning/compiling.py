"""How XLA compiles what calibration runs a few times for each shape: compiling is most of it."""

# Matrix products go to cuBLAS as they are. XLA would tune kernels of Triton's for each: that took 144
# of the 150 seconds of a model's first layer on an H200, and the layers after it were no faster.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
