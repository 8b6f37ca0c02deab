"""A module an op: what is compiled ahead of time (`cases`), and what is checked for integers that overflow (`huge`).

`cases()` yields (label, callable); each calls the op's host functions of fused.py with the sizes of real models, on tensors made
by `torch.empty(..., device="meta")`: nothing is launched and no memory is needed. Every shipped config once, few cases.

`huge()` yields (label, callable) too; each calls host functions on `huge.huge_tensor`s whose offsets pass 2^31. Only the first and
the last program of each axis of a grid run, in the interpreter: let no program loop over more than some thousand tokens.
"""
