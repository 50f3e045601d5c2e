"""From graph nodes to plan steps: the value kinds, the draft of a plan, and one small function per ATen operation.

Who imports whom: `values` <- `draft` <- `registry` <- `shapes`, `mixing`, `elementwise`, `pooling`, `normalize` <- `dynprune.runtime.lower`.
"""
