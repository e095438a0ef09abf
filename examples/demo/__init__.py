"""A complete use of smelt: train small experts, merge them with `smelt merge`, and measure whether it paid.

Run it with `make demo` or `python -m examples.demo`. Read in this order: `__main__`, `corpus`, `model`,
`evaluate`, `commands`, `page`.
"""
