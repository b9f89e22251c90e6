"""Parsers of published data sets: one row of each into requests. No torch.

Which fields give a format away is in :mod:`hiedit_env.datasets.formats`.
"""

from __future__ import annotations

from hiedit_env.datasets import probes
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.rows import Row
from hiedit_env.datasets.writing import is_closed, question_mark_for

_PLACES = ("{}", "{subject}")


def zsre(row: Row) -> Request:
    """Question answering from zero-shot relation extraction, in the two layouts in use.

    Both have ``src``, ``rephrase``, ``loc``, ``loc_ans`` and mostly ``subject``. They differ in the
    answer to write:

    - With ``ans`` (MALMEN, RLEdit, UltraEdit and HiEdit, each in its ``data/zsre.py``): ``ans``.
      All four edit to it and ignore ``alt``, so results stay comparable with theirs.
    - With ``answers`` and ``alt`` (``zsre_mend_*.json``, as in EasyEdit's
      ``easyeditor/dataset/zsre.py``): ``alt``, the alternative that MEND edits to; ``answers[0]``
      is then the old answer. Where ``alt`` is blank, ``answers[0]`` is written, as always in ROME.

    In the files seen that carry both ``ans`` and ``alt``, the two are equal in every row.

    The four code bases append "?" to every ``loc``; here only to one without closing punctuation.
    ``portability`` holds ``New Question`` and ``New Answer`` (``…_portability_gpt4.json``).
    """
    subject = row.optional("subject")
    row = row.about(subject)
    prompt = row.prompt("src")
    recorded = row.texts("answers")
    candidates = (row.patchy("ans"), row.patchy("alt"), *recorded[:1])
    target = next((answer for answer in candidates if answer is not None), None)
    if target is None:
        raise row.error("ans", "holds no answer, and neither do 'alt' and 'answers'")
    asked = row.prompt("loc")
    if not is_closed(asked):
        asked = asked.rstrip() + question_mark_for(asked)
    row.value("cond")  # "old >> new || src": nothing new
    return Request(
        prompt=prompt,
        answer=target,
        subject=subject or prompt,
        paraphrases=(row.prompt("rephrase"), *probes.paraphrases(row, {"rephrase"})),
        locality=(Probe(asked, row.text("loc_ans")), *probes.unrelated(row, without={"loc"})),
        old_answer=recorded[0] if recorded and recorded[0] != target else None,
        source=row.source,
        portability=probes.portability(row),
        subject_aliases=probes.subject_aliases(row),
    )


def mend(row: Row) -> Request | None:
    """MEND's own lines of zsRE and FEVER (KILT's ``input`` and ``output``, arXiv 2110.11309).

    Fields as in MEND's ``data_classes``: ``alternatives[0]`` is written (MEND draws one of them at
    random), ``filtered_rephrases`` are the rewordings, ``prediction`` is the old answer. Rows
    without alternatives have nothing to write and are left out, as MEND does.
    """
    prompt = row.prompt("input")
    wanted = row.texts("alternatives")
    if not wanted:
        row.left_out.append("no 'alternatives'")
        return None
    return Request(
        prompt=prompt,
        answer=wanted[0],
        subject=row.patchy("subject") or prompt,
        paraphrases=row.texts("filtered_rephrases", prompt=True),
        locality=probes.unrelated(row),
        old_answer=row.patchy("prediction"),
        source=row.source,
        portability=probes.portability(row),
    )


def counterfact(row: Row) -> Request:
    """CounterFact (ROME, arXiv 2202.05262), as in RLEdit's and HiEdit's ``data/counterfact.py``.

    ``requested_rewrite`` holds ``prompt`` with "{}" where the ``subject`` goes, ``target_new.str``
    and ``target_true.str``. ``neighborhood_prompts`` are about subjects that share the true answer.
    A ``locality`` list of ``prompt`` and ``ground_truth``, where it is not empty, replaces them.
    MEMIT's ``multi_counterfact.json``, LEME and AKEW have the same fields and more; AKEW's
    WikiUpdate has ``answer_new`` and ``answer_true`` for the two targets.
    """
    rewrite = row.child("requested_rewrite")
    template = rewrite.text("prompt")
    if not any(place in template for place in _PLACES):
        raise rewrite.error("prompt", "has no '{}' to put the subject in")
    subject = rewrite.text("subject")
    row, rewrite = row.about(subject), rewrite.about(subject)
    if "answer_new" in rewrite.fields:
        answer, true_answer = rewrite.text("answer_new"), rewrite.patchy("answer_true")
    else:
        true_answer = rewrite.child("target_true").text("str")
        answer = rewrite.child("target_new").text("str")
    nearby = probes.neighbours(row, true_answer)
    rewrite.value("prompt_full")  # the prompt, filled
    reworded = rewrite.patchy("question", prompt=True)
    return Request(
        prompt=rewrite.prompt(),
        answer=answer,
        subject=subject,
        paraphrases=row.texts("paraphrase_prompts", prompt=True)
        + ((reworded,) if reworded else ()),
        locality=(row.probes("locality", "ground_truth") or tuple(nearby))
        + probes.unrelated(row, without={"locality", "neighborhood_prompts"}),
        old_answer=true_answer,
        relation=row.optional("relation") or rewrite.optional("relation_id"),
        source=row.source,
        portability=probes.portability(row),
    )


def mquake(row: Row) -> tuple[Request, ...]:
    """MQuAKE, CF and T (arXiv 2305.14795): one row is several edits and what follows from them all.

    Each entry of ``requested_rewrite`` is a request, with its ``question`` as paraphrase.
    ``questions`` with ``new_answer``, and ``new_single_hops``, belong to the last of them, since
    they are right only after all. AKEW's ``loc`` and ``loc_ans`` belong to each.
    """
    rewrites = row.children("requested_rewrite")
    if not rewrites:
        raise row.error("requested_rewrite", "is empty")
    follows: list[Probe] = []
    if row.has("new_answer"):
        answer, aliases = row.text("new_answer"), row.text_or_texts("new_answer_alias")
        asked = row.texts("questions", prompt=True)
        follows += [Probe(question, answer, "multi-hop", aliases) for question in asked]
    for hop in row.children("new_single_hops"):
        answer, aliases = hop.text("answer"), hop.text_or_texts("answer_alias")
        texts = (hop.patchy("question", prompt=True), hop.patchy("cloze", prompt=True))
        follows += [Probe(text, answer, "single-hop", aliases) for text in texts if text]
    unrelated = probes.unrelated(row)
    requests = []
    for i, plain in enumerate(rewrites):
        subject = plain.text("subject")
        rewrite = plain.about(subject)
        question = rewrite.patchy("question", prompt=True)
        true = rewrite.child("target_true").text("str") if rewrite.has("target_true") else None
        requests.append(
            Request(
                prompt=rewrite.prompt(),
                answer=rewrite.child("target_new").text("str"),
                subject=subject,
                paraphrases=(question,) if question else (),
                locality=unrelated,
                old_answer=true,
                relation=rewrite.patchy("relation_id"),
                source=f"{row.source} requested_rewrite[{i}]" if i else row.source,
                portability=tuple(follows) if i == len(rewrites) - 1 else (),
            )
        )
    return tuple(requests)


def rome(row: Row) -> Request:
    """A request of ROME or MEMIT: ``prompt`` with "{}", ``subject``, ``target_new.str``."""
    subject = row.text("subject")
    row = row.about(subject)
    true = row.child("target_true").text("str") if row.has("target_true") else None
    return Request(
        prompt=row.prompt(),
        answer=row.child("target_new").text("str"),
        subject=subject,
        paraphrases=probes.paraphrases(row),
        locality=probes.unrelated(row, true),
        old_answer=true,
        relation=row.patchy("relation_id") or row.patchy("relation"),
        source=row.source,
        portability=probes.portability(row),
    )


def ultraeditbench(row: Row) -> Request:
    """UltraEditBench (arXiv 2505.14679): fields as in UltraEdit's ``data/ultraeditbench.py``."""
    subject = row.optional("subject")
    row = row.about(subject)
    prompt = row.prompt()
    return Request(
        prompt=prompt,
        answer=row.text("ans"),
        subject=subject or prompt,
        paraphrases=(
            row.prompt("rephrase_prompt"),
            *probes.paraphrases(row, {"rephrase_prompt"}),
        ),
        locality=(
            Probe(row.prompt("loc"), row.text("loc_ans")),
            *probes.unrelated(row, without={"loc"}),
        ),
        relation=row.patchy("relation"),
        source=row.source,
        portability=probes.portability(row),
    )


def wikibigedit(row: Row) -> Request:
    """WikiBigEdit (arXiv 2503.05683): fields as in the card of ``lukasthede/WikiBigEdit``.

    ``personas``, the question as some persona would put it, is a further paraphrase; ``mhop`` is
    portability. A locality question without its answer, or the reverse, is left out.
    """
    subject = row.patchy("subject")
    row = row.about(subject)
    prompt = row.prompt("update")
    unrelated, said = row.patchy("loc", prompt=True), row.patchy("loc_ans")
    return Request(
        prompt=prompt,
        answer=row.text("ans"),
        subject=subject or prompt,
        paraphrases=probes.paraphrases(row),
        locality=(Probe(unrelated, said),) if unrelated and said else (),
        old_answer=row.first_text("ground_truth"),
        relation=row.patchy("relation"),
        source=row.source,
        portability=probes.portability(row),
    )


def knowedit(row: Row) -> Request:
    """KnowEdit's ZsRE, Wiki-recent and Wiki-counterfact (arXiv 2401.01286), CKnowEdit, EasyEdit's.

    Fields as in EasyEdit's ``examples/KnowEdit.md`` and ``easyeditor/dataset/``: ``prompt``,
    ``target_new``, ``subject``; ``ground_truth`` (text, or lists of aliases of which the first
    counts) or ``target_old`` is the old answer. ``locality`` and ``portability`` map names of
    groups such as ``Relation_Specificity`` to lists of ``prompt`` and ``ground_truth``, or are such
    lists themselves; ``locality_prompt`` with ``locality_ground_truth`` and the like are read too.
    """
    subject = row.patchy("subject")
    row = row.about(subject)
    if row.fields.get("locality") == [] and "target_old" not in row.fields:
        raise row.error("locality", "must be an object, got a list")
    prompt = row.prompt()
    old = row.first_text("ground_truth") or row.first_text("target_old")
    row.value("cond")  # "old >> new || prompt": nothing new
    return Request(
        prompt=prompt,
        answer=row.text("target_new"),
        subject=subject or prompt,
        paraphrases=probes.paraphrases(row),
        locality=probes.unrelated(row, old),
        old_answer=old,
        relation=row.patchy("relation"),
        source=row.source,
        portability=probes.portability(row),
        subject_aliases=probes.subject_aliases(row),
    )


def knowedit_wikibio(row: Row) -> Request:
    """KnowEdit's WikiBio: ``text`` is continued by ``labels``, about ``concept``; same sources."""
    subject = row.patchy("concept")
    row = row.about(subject)
    prompt = row.prompt("text")
    return Request(
        prompt=prompt,
        answer=row.text("labels"),
        subject=subject or prompt,
        locality=probes.unrelated(row),
        source=row.source,
        portability=probes.portability(row),
    )


def fever(row: Row) -> Request:
    """FEVER as MALMEN flattens it: ``prompt`` is a claim, ``alt`` the label to write."""
    prompt = row.prompt()
    return Request(
        prompt=prompt,
        answer=_label(row, "alt"),
        subject=row.patchy("subject") or prompt,
        paraphrases=probes.paraphrases(row),
        locality=probes.unrelated(row),
        old_answer=_label(row, "pred") if row.has("pred") else None,
        source=row.source,
        portability=probes.portability(row),
    )


def _label(row: Row, field: str) -> str:
    """A text; "true" or "false" for a truth value in a list of labels such as ``[true]`` too."""
    value = row.value(field)
    return str(value).lower() if isinstance(value, bool) else row.text(field)


def target(row: Row) -> Request:
    """QAEdit (arXiv 2502.11177) and FastEdit: ``prompt`` and ``target``."""
    subject = row.patchy("subject")
    row = row.about(subject)
    prompt = row.prompt()
    return Request(
        prompt=prompt,
        answer=row.text("target"),
        subject=subject or prompt,
        paraphrases=probes.paraphrases(row),
        locality=probes.unrelated(row),
        old_answer=row.first_text("ground_truth"),
        source=row.source,
        portability=probes.portability(row),
    )


def unke(row: Row) -> Request:
    """UnKEBench (arXiv 2405.15349) and other questions with answers: ``question``, ``answer``."""
    subject = row.patchy("subject")
    row = row.about(subject)
    prompt = row.prompt("question")
    return Request(
        prompt=prompt,
        answer=row.text("answer"),
        subject=subject or prompt,
        paraphrases=probes.paraphrases(row),
        locality=probes.unrelated(row),
        source=row.source,
        portability=probes.portability(row),
        subject_aliases=probes.subject_aliases(row),
    )


def hallueditbench(row: Row) -> Request:
    """HalluEditBench (arXiv 2410.16251), its tables as JSON: ``question`` and ``object``."""
    subject = row.patchy("subject")
    row = row.about(subject)
    prompt = row.prompt("question")
    return Request(
        prompt=prompt,
        answer=row.text("object"),
        subject=subject or prompt,
        paraphrases=probes.paraphrases(row),
        locality=probes.unrelated(row),
        relation=row.patchy("relation"),
        source=row.source,
        portability=probes.portability(row),
    )
