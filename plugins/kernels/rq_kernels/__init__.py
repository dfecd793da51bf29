"""The op set rq.moe as kernels in the Triton language. docs/kernels.md is their contract."""
