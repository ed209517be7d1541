"""The model hub: files from the local cache first, without minutes of retries for the others; commits to the hub."""

import contextlib
import errno
import re
from pathlib import Path

from utils.cli import note, shows_progress
from utils.files import reason

CONNECT_TIMEOUT = 10  # seconds; the hub's own library retries for minutes
FORM = "ORG/NAME[@REVISION]"
PREFIX = "hf-hub:"
REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


def parse_repository(name):
    """Return (ORG/NAME, revision or None) of a repository's name, with or without PREFIX; None for any other text.

    Raises: ValueError where PREFIX is not followed by a repository's name.
    """
    found = REPOSITORY.fullmatch(str(name).removeprefix(PREFIX))
    if not found and str(name).startswith(PREFIX):
        raise ValueError(f"{name} names no repository of the hub; write {PREFIX}{FORM}")
    return found and found.groups()


def cached_first(fetch):
    """Call a function that fetches files: first offline, then, if the hub answers, online.

    Args:
        fetch: function without arguments that uses the hub's library.
    Returns: what it returns.
    Raises: what it raises where the files are not in the cache and the hub does not answer or does not have them.
    """
    try:
        with _cut_off():
            return fetch()
    except (OSError, ValueError, RuntimeError):
        if not hub_answers():
            raise
    return fetch()


@contextlib.contextmanager
def _cut_off():
    """Let the hub's library use its cache only."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers():
    """Tell whether the model hub may and can be reached, through the user's proxy settings."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=CONNECT_TIMEOUT):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500  # a mirror may have no page there
    except OSError:
        return False


def newest(repository, revision, name):
    """Return a file of a repository as it is now, or, where the hub does not answer, as it was last fetched.

    Args:
        repository: ORG/NAME.
        revision: branch, tag or commit; None is `main`. A commit that is in the cache is not asked for.
        name: of the file.
    Returns: its path in the cache, `.../<commit>/name`, or None where the repository has no such file.
    Raises: FileNotFoundError, which says what helps.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if COMMIT.fullmatch(revision or ""):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path)
    answers = hub_answers()
    with _speaking(repository, revision), contextlib.nullcontext() if answers else _cut_off():
        try:
            path = Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # unknown without the hub
                raise
            return None
    if not answers and not constants.HF_HUB_OFFLINE:
        note(f"the hub does not answer: {repository} is taken as it was last fetched, commit {path.parent.name[:8]}")
    return path


def fetch_commit(repository, commit, patterns):
    """Fetch the files of a commit that match patterns; raises FileNotFoundError, which says what helps."""
    from huggingface_hub import snapshot_download

    with _speaking(repository, commit), contextlib.nullcontext() if hub_answers() else _cut_off():
        snapshot_download(repository, revision=commit, allow_patterns=patterns)


@contextlib.contextmanager
def _speaking(repository, revision=None):
    """Let the hub's library show progress where commands do, and turn its errors into one line.

    Raises: FileNotFoundError where the body fails; the system's own error where the disk is full.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    before, silenced = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity_error()  # it warns at each try
    if not shows_progress():
        disable_progress_bars()
    try:
        yield
    except Exception as error:  # the library raises errors of its own, of its HTTP client and of the system
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FileNotFoundError(_explain(error, repository, revision)) from error
    finally:
        logging.set_verbosity(before)
        if not silenced:
            enable_progress_bars()


def _explain(error, repository, revision):
    """Say in one line why the hub did not do what was asked, and what helps."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    address = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated: accept its terms at {address}, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision}; {address}/commits/main lists them"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub shows no {repository}: check the name, or, if it is private, {LOG_IN}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set: unset it to reach {constants.ENDPOINT}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        what = f"{repository}@{revision}" if revision else repository
        return (
            f"{why} and {what} is not whole in the cache: run this once with a network, or elsewhere "
            f"`hf download {repository} --local-dir DIR`, and pass the folder DIR"
        )
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return (
            f"the hub does not let you do that with {repository} ({status or 'no token'}): {LOG_IN}, with the right to"
        )
    return f"{repository}: the hub failed ({reason(error)}); run the same command again"


def check_push(repository, private=False):
    """Refuse a repository that nothing can be pushed to, before any work.

    Args:
        repository: ORG/NAME.
        private: whether it is meant to be private.
    Returns: names of the files that it holds by now; none where it does not exist.
    Raises: ValueError where it is public and should not be; FileNotFoundError, which says what helps.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

    with _speaking(repository):
        if not get_token():
            raise LocalTokenNotFoundError
        HfApi().whoami()
        try:
            there = HfApi().model_info(repository)
        except RepositoryNotFoundError:
            return []
    if private and not there.private:
        raise ValueError(
            f"--private: {repository} is there and public; make it private in its settings, or name another"
        )
    return [file.rfilename for file in there.siblings or ()]


def push(folder, repository, message, private=False):
    """Upload a folder as a commit to a repository, which is made where it does not exist.

    Args:
        repository: ORG/NAME. message: of the commit. private: for a new repository.
    Returns: (address of the repository, the commit).
    Raises: FileNotFoundError, which says what helps.
    """
    from huggingface_hub import HfApi

    with _speaking(repository):
        address = HfApi().create_repo(repository, exist_ok=True, private=private or None)
        commit = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return str(address), commit.oid
