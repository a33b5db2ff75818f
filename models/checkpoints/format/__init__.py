"""Our directories on disk: written, verified, read. Nothing is unpickled."""
