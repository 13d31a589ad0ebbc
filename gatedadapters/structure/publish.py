"""From the folder of saved adapters to a repository on the hub: card, picture, and one commit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gatedadapters.config.search import BUNDLED
from gatedadapters.errors import ArtifactError
from gatedadapters.safe_files import write_text
from gatedadapters.structure.card import CARD, PICTURE, UNKNOWN_LICENSE, by_hand, license_of, model_card
from gatedadapters.structure.folder import STRUCTURE, WEIGHTS, read_origin
from gatedadapters.structure.hub import card_of, pushed
from gatedadapters.structure.origin import Origin, has_id_form
from gatedadapters.structure.structure import Structure

OnCard = Literal["write", "keep", "replace"]
"""What a push does with a card that somebody wrote or edited: `write` refuses to replace it."""


def publish(
    folder: Path,
    repository: str,
    *,
    license: str | None = None,
    card: OnCard = "write",
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload adapters",
) -> str:
    """Commit what `Adapters.save` wrote into `folder` to a repository, as `Adapters.push_to_hub` says.

    In `folder` the card is replaced, and a picture drawn beside it.
    """
    found = card_of(repository, revision=revision)
    if card == "write" and found is not None and by_hand(found):
        raise ArtifactError(
            "the repository has a card that somebody wrote or edited",
            expected="no card, or one as this library wrote it",
            got=f"{len(found):,} characters of another kind",
            where=f"{CARD} of {repository}",
            fix='push_to_hub(..., card="keep") leaves it as it is, card="replace" replaces it',
        )
    files = [STRUCTURE, WEIGHTS]
    if found is None or card != "keep":
        structure, origin = read_origin(folder)
        write_card(folder, structure, origin, repository=repository, license=license or license_of(found or ""))
        files += [CARD, PICTURE]
    return pushed(repository, folder, files=files, private=private, revision=revision, message=message)


def write_card(
    folder: Path, structure: Structure, origin: Origin | None, *, repository: str | None, license: str | None
) -> None:
    """Write the card for a repository and the picture that it shows into a folder; for the arguments see `model_card`.

    Raises:
        FileAccessError: the file system refuses.
    """
    from gatedadapters.structure.picture import save_png  # imported here: matplotlib takes long to import

    save_png(structure, folder / PICTURE)
    stated = license or UNKNOWN_LICENSE
    write_text(folder / CARD, model_card(structure, origin, repository=repository, license=stated, picture=True))


def published(origin: Origin, base_model: str | None, *, fix: str | None = None) -> Origin:
    """The origin as others can use it, who do not have the folders of this machine.

    Args:
        origin: as the adapters have it.
        base_model: the name of the base on the hub, in place of the one that the origin names.
        fix: what to tell the user to do, where that is not to give `base_model`.

    Raises:
        ArtifactError: the base or the tokenizer is named by a folder of this machine.
    """
    if base_model is not None:
        update = {"base_model_name_or_path": base_model, "revision": None, "tokenizer": base_model}
        origin = origin.model_copy(update=update)
    for what, name in (("base", origin.base_model_name_or_path), ("tokenizer", origin.tokenizer)):
        if name is not None and not name.startswith(BUNDLED) and not has_id_form(name):
            raise ArtifactError(
                f"the adapters name their {what} by a folder of this machine, which others do not have",
                expected="the id of a model on the hub",
                got=name,
                where="push_to_hub",
                fix=fix or 'name it: push_to_hub(..., base_model="user/base")',
            )
    return origin
