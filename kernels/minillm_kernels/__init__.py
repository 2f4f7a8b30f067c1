"""The kernels of minillm: a file for each kind, with C and PyTorch code and most with a Triton kernel.

    linear          x W^T in fp32, bf16, fp16           decode_attention   a few tokens over a long cache
    int8_linear     one scale per output                flash_attention    causal prefill
    int4_linear     one scale and zero point per group  norm               RMSNorm, LayerNorm, with the addition
    gated_mlp       act(x Wg^T) * (x Wu^T),             rope               rotary embedding + cache write
                    any of the three weight formats     activation         gelu, relu, ... on their own
    sampling        logits to a token, drafts judged    quantize           int4 that loses least (in C only)
                                                        op                 how all of them are called

Each is one callable: C eagerly on a CPU, most a node `minillm::name` of a compiled graph, Triton on a GPU. `cpu/` holds
the C, `gpu/` the Triton kernels. Importing this package builds nothing and asks no device anything.
"""
