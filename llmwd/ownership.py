"""Who else on this node may change a file or folder, by its owner and mode."""

import grp
import os
import pwd
import stat

TRUSTED_UID = 0


def is_ours_or_roots(found: os.stat_result) -> bool:
    """Whether nobody else owns it: an owner may change it whatever its mode says."""
    return found.st_uid in (os.getuid(), TRUSTED_UID)


def others_may_write(found: os.stat_result) -> bool:
    """Whether its mode lets somebody write who is not its owner. A group that has nobody but us in it is no harm: where every
    user has one, files and folders are often group-writable (umask 002)."""
    return bool(found.st_mode & stat.S_IWOTH) or bool(found.st_mode & stat.S_IWGRP and not _is_ours_alone(found.st_gid))


def others_may_read(found: os.stat_result) -> bool:
    """Likewise for reading."""
    return bool(found.st_mode & stat.S_IROTH) or bool(found.st_mode & stat.S_IRGRP and not _is_ours_alone(found.st_gid))


def _is_ours_alone(gid: int) -> bool:
    """Whether it is our own user's private group, by the convention that it has the user's name. Who else has it as the
    first group cannot be asked: directories of a site list thousands, or none."""
    try:
        us, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == us.pw_gid and group.gr_name == us.pw_name and set(group.gr_mem) <= {us.pw_name}
