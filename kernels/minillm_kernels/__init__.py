"""The kernels of minillm: one op per file, each with a CPU implementation and a Triton CUDA one.

    linear          x W^T in fp32, bf16, fp16           decode_attention   a few tokens over a long cache
    int8_linear     one scale per output                flash_attention    causal prefill
    int4_linear     one scale and zero point per group  norm_rope          RMSNorm, rotary + cache write
    gated_mlp       act(x Wg^T) * (x Wu^T), any of the three weight formats

Every op is a `torch.library.custom_op` in the namespace `minillm`, so it stays one node of a compiled graph.
`cpu/` holds the C that the matrix products run on CPU, `gpu/` the Triton kernels, `catalog.py` what each op
must compute and how exactly. Importing this package builds nothing and asks no device anything.
"""
