"""Captioned pictures in tar files, encoded once into MDS shards."""

import os
import pwd

# torch asks for the user's name while it is imported, and a container's user need not have one.
if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ["USER"] = f"uid{os.getuid()}"
