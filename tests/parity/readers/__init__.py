"""One module per system, or part of one: `SYSTEM`, `READERS = {kind: fn(case) -> {"output/..": array}}`.

A reader only renames tensors and calls the functions that training calls; what it cannot give yet is named in
`WAITING = {(kind, prefix of the tensor's name): reason}` and shown in the summary.
"""
