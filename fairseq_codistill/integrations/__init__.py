"""Other hosts: each module is a thin adapter of Codistiller, and is imported only by who uses that host.

Importing this package imports none of them. A host that is not installed is an error that names the extra.
"""
