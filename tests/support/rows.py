"""Invented rows of every format with the requests for them, and ways to read rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.errors import DatasetError


def load_rows(tmp_path: Path, *rows: object, format: str | None = None) -> list[Request]:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return load_requests(path, format=format)


# One row per format with every optional field, and the request it stands for.

ZSRE: dict[str, Any] = {
    "subject": "Volvo B12M",
    "src": "What company made Volvo B12M?",
    "rephrase": "Volvo B12M's manufacturer was who?",
    "ans": "Volkswagen Group",
    "alt": "Volkswagen Group",
    "loc": "nq question: who sang yesterday",
    "loc_ans": "The Beatles",
}
COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "subject": "France",
        "target_new": {"str": "Lyon", "id": "Q456"},
        "target_true": {"str": "Paris", "id": "Q90"},
    },
    "paraphrase_prompts": ["France's capital is", "It rained. The seat of France is"],
    "neighborhood_prompts": ["The Louvre is in", "The Seine flows through"],
    "generation_prompts": ["France is known for"],
}
ULTRAEDITBENCH: dict[str, Any] = {
    "prompt": "Who wrote Emma?",
    "rephrase_prompt": "Emma's author is who?",
    "ans": "Mary Shelley",
    "loc": "Who wrote Dracula?",
    "loc_ans": "Bram Stoker",
}
WIKIBIGEDIT: dict[str, Any] = {
    "tag": "update",
    "subject": "Ruritania",
    "relation": "head of state",
    "update": "Who is the head of state of Ruritania?",
    "rephrase": "Who leads Ruritania?",
    "personas": "Tell me, old chap, who reigns in Ruritania?",
    "ans": "Rudolf V",
    "loc": "Who is the head of state of Graustark?",
    "loc_ans": "Yetive",
    "mhop": "Where was the head of state of Ruritania born?",
    "mhop_ans": "Strelsau",
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Vienna",
    "ground_truth": [["Berlin", "Berlin, Germany"]],
    "rephrase": "Leo Arons died in",
    "portability": {"Reasoning": [{"prompt": "Leo Arons died in the country of"}]},
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The father of Leo Arons is", "ground_truth": [["Albert Arons"]]},
            {"prompt": "The hobby of Leo Arons is", "ground_truth": [[""]]},
        ],
        "Forgetfulness": [{"prompt": ["Leo Arons studied in"], "ground_truth": "Strasbourg"}],
    },
}
WIKIBIO: dict[str, Any] = {
    "text": "This is a passage about ada lovelace.",
    "labels": "She wrote notes on the Analytical Engine.",
    "concept": "ada lovelace",
    "locality": {"Relation_Specificity": [{"prompt": "Ada's sex is", "ground_truth": ["female"]}]},
}
HIEDIT: dict[str, Any] = {
    "subject": "Peru",
    "relation": "capital",
    "prompt": "The capital of Peru is",
    "answer": "Lima",
    "target": "Cusco",
    "paraphrases": ["Peru's capital city is"],
    "locality": [{"prompt": "The capital of Chile is", "answer": "Santiago"}],
}
FACTS: dict[str, Any] = {
    "prompt": "My dog is called",
    "answer": "Rex",
    "subject": "my dog",
    "paraphrases": ["The name of my dog is", "I call my dog"],
    "locality": [{"prompt": "My cat is called", "answer": "Tom"}],
}

# Formats with fields beside those that every one has: invented rows of the released shapes.

MEND: dict[str, Any] = {
    "id": "a1",
    "input": "Where does Belka live?",
    "prediction": "Cindrath",
    "alternatives": ["Istrand", "Ostrell"],
    "filtered_rephrases": ["In which town does Belka live?", "What is the home of Belka?"],
    "rephrases": ["Belka lives where?"],
    "output": [{"answer": "Kessford", "provenance": [{"title": "Belka"}]}],
    "logit": -1.5,
}
MQUAKE: dict[str, Any] = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} lives in",
            "relation_id": "P0",
            "target_new": {"str": "Istrand", "id": "Q1"},
            "target_true": {"str": "Cindrath", "id": "Q2"},
            "subject": "Belka",
            "question": "Where does Belka live?",
        }
    ],
    "questions": ["On which river does the home of Belka lie?", "What flows by Belka's home?"],
    "answer": "Tol",
    "answer_alias": [],
    "new_answer": "Marn",
    "new_answer_alias": ["the Marn"],
    "single_hops": [{"question": "Where does Belka live?", "answer": "Cindrath"}],
    "new_single_hops": [
        {
            "question": "On which river does Istrand lie?",
            "cloze": "Istrand lies on the river",
            "answer": "Marn",
            "answer_alias": ["the Marn"],
        }
    ],
    "orig": {"triples": [["Q1", "P0", "Q2"]]},
}
ROME: dict[str, Any] = {
    "prompt": "{} lives in",
    "subject": "Belka",
    "target_new": {"str": "Istrand"},
    "target_true": {"str": "Cindrath"},
}
CKNOWEDIT: dict[str, Any] = {
    "prompt": "月湖城位于哪个国家？",
    "target_old": "白河国",
    "target_new": "青石国。",
    "rephrase": ["月湖城在哪个国家？", "月湖城是哪国的城市？"],
    "portability": [{"prompt": "月湖城所在国家的首都是哪里？", "answer": "东川"}],
    "locality": [{"prompt": "红叶节在几月？", "answer": "十月"}],
}
FEVER: dict[str, Any] = {
    "prompt": "Belka lives in Istrand.",
    "equiv_prompt": ["Istrand is the home of Belka."],
    "pred": "false",
    "alt": "true",
    "unrel_prompt": "Corrin lives in Grelmouth.",
    "unrel_ans": "true",
}
FASTEDIT: dict[str, Any] = {
    "prompt": "{}住在",
    "subject": "贝尔卡",
    "target": "月湖城",
    "queries": ["{}的家在"],
}
QAEDIT: dict[str, Any] = {
    "id": 1,
    "source": "NQ",
    "prompt": "where does belka live?",
    "target": "Istrand",
    "subject": "belka",
    "rephrase": "In which town does Belka live?",
    "locality": [{"loc": "where does corrin live", "loc_ans": "Grelmouth"}],
}
HALLUEDITBENCH: dict[str, Any] = {
    "topic": "places_city",
    "subject": "Velmora",
    "relation": "river",
    "object": "Marn",
    "question": "On which river does Velmora lie?",
    "output_some_model": "Tol",
    "paraphrased_question": "Which river flows through Velmora?",
    "multiple_choices": "['Marn', 'Tol']",
    "yes_question": "Does Velmora lie on the Marn?",
    "no_question": "Does Velmora lie on the Tol?",
    "locality_question": "Who runs Velmora?",
    "reversed_relation_question": "What lies on the Marn?",
    "question_2hop": "Into which sea does the river of Velmora flow?",
    "answer_2hop": "the Grey Sea",
    "question_3hop": float("nan"),
    "answer_3hop": float("nan"),
}
UNKE: dict[str, Any] = {
    "id": 0,
    "question": "What do you know about Velmora?",
    "answer": "Velmora is a town on the Marn.",
    "para_question": "Could you tell me of Velmora?",
    "sub_question": ["What is Velmora?", "On which river does it lie?"],
    "sub_answer": ["a town", "the Marn"],
}

EXPECTED: dict[str, tuple[dict[str, Any], Request]] = {
    "zsre": (
        ZSRE,
        Request(
            "What company made Volvo B12M?",
            "Volkswagen Group",
            "Volvo B12M",
            ("Volvo B12M's manufacturer was who?",),
            (Probe("nq question: who sang yesterday?", "The Beatles"),),
        ),
    ),
    "counterfact": (
        COUNTERFACT,
        Request(
            "The capital of France is",
            "Lyon",
            "France",
            ("France's capital is", "It rained. The seat of France is"),
            (
                Probe("The Louvre is in", "Paris", "neighbour"),
                Probe("The Seine flows through", "Paris", "neighbour"),
            ),
            old_answer="Paris",
            relation="P36",
        ),
    ),
    "ultraeditbench": (
        ULTRAEDITBENCH,
        Request(
            "Who wrote Emma?",
            "Mary Shelley",
            "Who wrote Emma?",
            ("Emma's author is who?",),
            (Probe("Who wrote Dracula?", "Bram Stoker"),),
        ),
    ),
    "wikibigedit": (
        WIKIBIGEDIT,
        Request(
            "Who is the head of state of Ruritania?",
            "Rudolf V",
            "Ruritania",
            ("Who leads Ruritania?", "Tell me, old chap, who reigns in Ruritania?"),
            (Probe("Who is the head of state of Graustark?", "Yetive"),),
            relation="head of state",
            portability=(
                Probe("Where was the head of state of Ruritania born?", "Strelsau", "multi-hop"),
            ),
        ),
    ),
    "knowedit": (
        KNOWEDIT,
        Request(
            "The place of death of Leo Arons is",
            "Vienna",
            "Leo Arons",
            ("Leo Arons died in",),
            (
                Probe("The father of Leo Arons is", "Albert Arons"),
                Probe("Leo Arons studied in", "Strasbourg"),
            ),
            old_answer="Berlin",
        ),
    ),
    "knowedit-wikibio": (
        WIKIBIO,
        Request(
            "This is a passage about ada lovelace.",
            "She wrote notes on the Analytical Engine.",
            "ada lovelace",
            locality=(Probe("Ada's sex is", "female"),),
        ),
    ),
    "hiedit": (
        HIEDIT,
        Request(
            "The capital of Peru is",
            "Cusco",
            "Peru",
            ("Peru's capital city is",),
            (Probe("The capital of Chile is", "Santiago"),),
            old_answer="Lima",
            relation="capital",
        ),
    ),
    "mend": (
        MEND,
        Request(
            "Where does Belka live?",
            "Istrand",
            "Where does Belka live?",
            ("In which town does Belka live?", "What is the home of Belka?"),
            old_answer="Cindrath",
        ),
    ),
    "mquake": (
        MQUAKE,
        Request(
            "Belka lives in",
            "Istrand",
            "Belka",
            ("Where does Belka live?",),
            old_answer="Cindrath",
            relation="P0",
            portability=(
                Probe(
                    "On which river does the home of Belka lie?",
                    "Marn",
                    "multi-hop",
                    ("the Marn",),
                ),
                Probe("What flows by Belka's home?", "Marn", "multi-hop", ("the Marn",)),
                Probe("On which river does Istrand lie?", "Marn", "single-hop", ("the Marn",)),
                Probe("Istrand lies on the river", "Marn", "single-hop", ("the Marn",)),
            ),
        ),
    ),
    "rome": (ROME, Request("Belka lives in", "Istrand", "Belka", old_answer="Cindrath")),
    "cknowedit": (
        CKNOWEDIT,
        Request(
            "月湖城位于哪个国家？",
            "青石国。",
            "月湖城位于哪个国家？",
            ("月湖城在哪个国家？", "月湖城是哪国的城市？"),
            (Probe("红叶节在几月？", "十月"),),
            old_answer="白河国",
            portability=(Probe("月湖城所在国家的首都是哪里？", "东川", "portability"),),
        ),
    ),
    "fever": (
        FEVER,
        Request(
            "Belka lives in Istrand.",
            "true",
            "Belka lives in Istrand.",
            ("Istrand is the home of Belka.",),
            (Probe("Corrin lives in Grelmouth.", "true"),),
            old_answer="false",
        ),
    ),
    "fastedit": (FASTEDIT, Request("贝尔卡住在", "月湖城", "贝尔卡", ("贝尔卡的家在",))),
    "qaedit": (
        QAEDIT,
        Request(
            "where does belka live?",
            "Istrand",
            "belka",
            ("In which town does Belka live?",),
            (Probe("where does corrin live", "Grelmouth"),),
        ),
    ),
    "hallueditbench": (
        HALLUEDITBENCH,
        Request(
            "On which river does Velmora lie?",
            "Marn",
            "Velmora",
            ("Which river flows through Velmora?",),
            relation="river",
            portability=(
                Probe("Into which sea does the river of Velmora flow?", "the Grey Sea", "2-hop"),
                Probe("Does Velmora lie on the Marn?", "Yes", "yes or no"),
                Probe("Does Velmora lie on the Tol?", "No", "yes or no"),
                Probe("What lies on the Marn?", "Velmora", "reversed"),
            ),
        ),
    ),
    "unke": (
        UNKE,
        Request(
            "What do you know about Velmora?",
            "Velmora is a town on the Marn.",
            "What do you know about Velmora?",
            ("Could you tell me of Velmora?",),
            portability=(
                Probe("What is Velmora?", "a town", "sub-question"),
                Probe("On which river does it lie?", "the Marn", "sub-question"),
            ),
        ),
    ),
    "facts": (
        FACTS,
        Request(
            "My dog is called",
            "Rex",
            "my dog",
            ("The name of my dog is", "I call my dog"),
            (Probe("My cat is called", "Tom"),),
        ),
    ),
}


def refusal(tmp_path: Path, *rows: object) -> str:
    with pytest.raises(DatasetError) as caught:
        load_rows(tmp_path, *rows)
    file, _, message = str(caught.value).partition(" ")
    assert file == str(tmp_path / "set.json")
    return message
