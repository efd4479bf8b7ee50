"""The library, in one operator less."""

def forward(x):
    return x.addcmul(x, x)
