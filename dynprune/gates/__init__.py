"""The gates: small modules that say what of a model an input needs, and the hooks that apply them to the user's own modules."""
