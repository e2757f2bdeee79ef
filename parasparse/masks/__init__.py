"""The masking kernel, and the two modules that mask: `Mask` and `SoftMask`."""
