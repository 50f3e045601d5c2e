"""From graph nodes to plan steps: the value kinds, the draft of a plan, and one small function per ATen operation.

Who imports whom: `values` <- `draft` <- `registry` <- `elementwise` <- `attention`, `mixing`, `normalize`, `pooling`, `shapes`; and
`draft` <- `gating`, `assemble`. `dynprune.runtime.lower` imports them all.
"""
