"""The Triton kernels. Importing this package imports Triton; the ops do so only when they need it."""
