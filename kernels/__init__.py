"""Hold the Triton kernels, a file for one launch or two; import them as ``fastinception.kernels``."""

if __name__ != "fastinception.kernels":
    raise ImportError(
        f"this folder is the package fastinception.kernels, not {__name__!r}: import fastinception.kernels "
        "(a top-level 'kernels' is another project's name)"
    )
