"""fairseq imports the modules of this folder by itself when it is given the package as ``--user-dir``."""
