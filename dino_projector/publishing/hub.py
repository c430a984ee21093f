# Copyright 2026 The flux-dino-tile authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Sends an assembled folder to the Hub in one commit, and compares what arrived."""

import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..training.checkpoints import error_line


# The base of all errors of the client's HTTP library, which is another in huggingface-hub 1 and 2.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
HUB_FILES = {".gitattributes"}  # that the Hub itself puts into a new repository
PROJECTOR_FILES = {"dino_projector/config.json", "pipeline.py"}  # of which one shows that a repository is of this kind
# What publishing raises for the world's faults, not its own.
EXPECTED_ERRORS = (HTTP_ERROR, OSError, ValueError, RuntimeError)
LOGIN_REMEDY = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"


class PublishError(RuntimeError):
    """Nothing was published; the message is one line."""


class Published(NamedTuple):
    """
    Args:
        commit (`str`): Its sha.
        url (`str`): Where to look at it.
        is_new (`bool`): False if the repository had all of it already, so that no commit was made.
    """

    commit: str
    url: str
    is_new: bool


class Target(NamedTuple):
    """
    Where to publish.

    Args:
        repo_id (`str`): `owner/name`.
        branch (`str`): Made from `main` if it is not there.
        is_private (`bool`, *optional*): Of a new repository; of an existing one it must be so.
        is_pull_request (`bool`): Propose the commit instead of making it.
    """

    repo_id: str
    branch: str = "main"
    is_private: bool | None = None
    is_pull_request: bool = False


class State(NamedTuple):
    """
    Of the repository before the publishing.

    Args:
        head (`str`, *optional*): Commit of the branch, or else of `main`; `None` without a repository.
        has_branch (`bool`): Whether the branch is there.
        files (`list[str]`): At that commit.
    """

    head: str | None
    has_branch: bool
    files: list[str]


def explain(error: BaseException, token: str | None) -> str:
    """What went wrong with the Hub, in one line without the token."""
    message = describe(causes(error))
    # The HTTP library quotes headers that it cannot send.
    return message if token is None else message.replace(token, "<token>").replace(repr(token)[1:-1], "<token>")


def causes(error: BaseException) -> list[BaseException]:
    """The error and those that it came from, as a traceback would show them."""
    chain = [error]
    while True:
        last = chain[-1]
        cause = last.__cause__ if last.__suppress_context__ else last.__cause__ or last.__context__
        if cause is None:
            return chain
        chain.append(cause)


def describe(chain: list[BaseException]) -> str:
    first = next((error for error in chain if isinstance(error, (HTTP_ERROR, LocalTokenNotFoundError))), chain[0])
    if isinstance(first, LocalTokenNotFoundError):
        return f"not logged in to the Hub: {LOGIN_REMEDY}"
    if isinstance(first, GatedRepoError):
        return (
            f"{first.repo_id} is gated and this account has no access: accept its terms on its page,"
            f" https://huggingface.co/{first.repo_id}, and log in"
        )
    if any(isinstance(error, OfflineModeIsEnabled) for error in chain):
        return "the Hub may not be asked, because HF_HUB_OFFLINE is set"
    if isinstance(first, HfHubHTTPError):
        status = first.response.status_code
        if status == 401 and not isinstance(first, RepositoryNotFoundError):
            return f"the Hub does not accept the token: {LOGIN_REMEDY}"
        return f"the Hub refused ({status}): {first.server_message or error_line(first)}"
    if isinstance(first, HTTP_ERROR):
        reason = error_line(first) if str(first) else type(first).__name__
        return f"the connection to the Hub failed ({reason}): the same command goes on from what has arrived"
    return error_line(first)


def check_owner(api: HfApi, target: Target) -> None:
    """Raises a `PublishError` unless the account may make repositories under the owner's name."""
    account = api.whoami()
    owners = [account["name"], *(organization["name"] for organization in account["orgs"])]
    owner = target.repo_id.split("/")[0]
    if owner not in owners and not target.is_pull_request:
        raise PublishError(
            f"{target.repo_id}: the account {account['name']} cannot publish as {owner}: choose a name under"
            f" {' or '.join(owners)}, or propose the change with --create-pr"
        )


def find_branch(api: HfApi, target: Target) -> tuple[ModelInfo, bool]:
    """The branch, or `main` if it is not there, and whether it is."""
    try:
        return api.model_info(target.repo_id, revision=target.branch), True
    except RevisionNotFoundError:
        return api.model_info(target.repo_id), False


def look(api: HfApi, target: Target) -> State:
    """
    What is there.

    Raises:
        `PublishError`: If it is not what one can publish to.
    """
    try:
        info, has_branch = find_branch(api, target)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if target.is_pull_request:
            raise PublishError(
                f"{target.repo_id} does not exist, so there is nothing to propose a change to"
            ) from None
        return State(None, False, [])
    if target.is_private is not None and target.is_private != info.private:
        has, asked = ("private", "public") if info.private else ("public", "private")
        raise PublishError(f"{target.repo_id} is {has}, not {asked}: change that in its settings, or leave the option")
    files = file_names(info)
    if set(files) - HUB_FILES and not set(files) & PROJECTOR_FILES:
        raise PublishError(f"{target.repo_id} holds something else than a DINO projector: choose another name")
    return State(info.sha, has_branch, files)


def file_names(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or []]


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def find_stale(files: list[str], present: list[str]) -> list[str]:
    """Files of the repository that the folder has no longer, in those of its folders that are published."""
    folders = {path.split("/")[0] for path in files if "/" in path}
    return [path for path in present if "/" in path and path.split("/")[0] in folders and path not in files]


def send(api: HfApi, target: Target, state: State, folder: Path, message: str) -> Published:
    """Makes what is missing, and one commit."""
    if state.head is None:
        api.create_repo(target.repo_id, private=target.is_private)
    head = state.head or api.model_info(target.repo_id).sha
    if not state.has_branch and target.branch != "main":
        api.create_branch(target.repo_id, branch=target.branch, revision=head)
    files = list_files(folder)
    operations: list = [
        *(CommitOperationAdd(path, str(folder / path)) for path in files),
        *(CommitOperationDelete(path, is_folder=False) for path in find_stale(files, state.files)),
    ]
    # Of one commit, and only if nobody else has changed the branch: `upload_folder` may make several.
    commit = api.create_commit(
        target.repo_id,
        operations,
        commit_message=message,
        revision=target.branch,
        create_pr=target.is_pull_request,
        parent_commit=head,
    )
    return Published(commit.oid, commit.pr_url or commit.commit_url, commit.oid != head)


def clean_up(api: HfApi, target: Target, state: State) -> str:
    """Removes what was made for a commit that did not come; says what is left if the Hub does not answer."""
    try:
        if state.head is None:
            # The commit may have arrived, and only its answer been lost.
            if set(file_names(api.model_info(target.repo_id))) <= HUB_FILES:
                api.delete_repo(target.repo_id)
        elif not state.has_branch and api.model_info(target.repo_id, revision=target.branch).sha == state.head:
            api.delete_branch(target.repo_id, branch=target.branch)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return ""
    except HTTP_ERROR:
        return f"; {target.repo_id} may have been made, and be empty"
    return ""


def publish(api: HfApi, target: Target, folder: Path, message: str) -> Published:
    """
    Makes the Hub's repository what the folder is, in one commit, and compares what can be downloaded with it.

    Args:
        api (`HfApi`): With its token, if that is not the stored one.
        target ([`Target`]): Repository, branch and kind of change.
        folder (`Path`): From [`~dino_projector.publishing.assemble.assemble`].
        message (`str`): First line of the commit.

    Raises:
        `PublishError`: If it cannot be done; then what was begun is removed.
    """
    token = api.token if isinstance(api.token, str) else get_token()
    try:
        check_owner(api, target)
        state = look(api, target)
    except EXPECTED_ERRORS as error:
        raise PublishError(explain(error, token)) from None
    try:
        published = send(api, target, state, folder, message)
    except EXPECTED_ERRORS as error:
        is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code == 409
        rest = "" if is_refused else clean_up(api, target, state)
        raise PublishError(explain(error, token) + rest) from None
    except KeyboardInterrupt:
        clean_up(api, target, state)
        raise
    try:
        compare(api, target.repo_id, published.commit, folder)
    except EXPECTED_ERRORS as error:
        raise PublishError(f"published as {published.url}, but not compared: {explain(error, token)}") from None
    return published


def compare(api: HfApi, repo_id: str, commit: str, folder: Path) -> None:
    """Downloads the commit afresh; raises a `ValueError` if a file differs from the folder's."""
    with tempfile.TemporaryDirectory() as cache:
        downloaded = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=cache))
        for path in list_files(folder):
            if not (downloaded / path).is_file() or digest(downloaded / path) != digest(folder / path):
                raise ValueError(f"{path} is not on the Hub what it is here")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
