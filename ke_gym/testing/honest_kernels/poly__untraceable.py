"""Looks at a value, so that its Python has to run: the host lane."""

def forward(x):
    if float(x[0, 0]) == 12345.0:
        return x + x * x
    return x * x + x
