"""Random recipes: each is read, or refused as the user's mistake; no other exception, and no hang."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import cupel
from cupel.core.errors import CupelError
from cupel.runner.recipe import Recipe, read_recipe, recipe_of

KEEN = settings(derandomize=True, deadline=None, max_examples=120, database=None)
GOOD = [path.read_text(encoding="utf-8") for path in sorted((Path(cupel.__file__).parent / "recipes").glob("*.yaml"))]
WORDS = st.sampled_from(
    [
        "workload",
        "seeds",
        "given",
        "variants",
        "steps",
        "techniques",
        "probes",
        "gate",
        "fit",
        "apply",
        "with",
        "as",
        "plain",
        "lean",
        "epochs",
        "digits-cnn",
        "pdp",
        "accuracy",
        "teacher",
        "sparsity",
        "null",
        "true",
        "0",
        "1",
        "-1",
        "1e-3",
        ".inf",
        ".nan",
    ]
)
LEAF = st.one_of(
    WORDS, st.none(), st.booleans(), st.integers(-3, 10**30), st.floats(), st.text(max_size=8), st.binary(max_size=3)
)
RULES = st.one_of(
    st.sampled_from(
        [">= 0.9", ">= plain - 0.02", "<= plain / 4", "< 1.2.3", "> .", ">= plain / 0", ">=1e999", "> - 1"]
    ),
    st.text(alphabet="<>=. 0123456789eplain+-*/²٣", max_size=14),
    LEAF,
)
TREES = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
REF = WORDS | st.dictionaries(WORDS, TREES, min_size=1, max_size=2)
STEP = st.one_of(
    st.just("fit"),
    st.fixed_dictionaries({"fit": TREES}),
    st.fixed_dictionaries({"apply": REF}),
    st.fixed_dictionaries(
        {"fit": st.fixed_dictionaries({}, optional={"with": st.lists(REF, max_size=2), "epochs": LEAF})}
    ),
)
STEPS = st.lists(STEP, max_size=3) | TREES
GIVEN = st.fixed_dictionaries({"workload": REF}, optional={"steps": STEPS}) | st.text(max_size=6)
EXTRAS = {
    "probes": st.lists(REF, max_size=2) | TREES,
    "seeds": st.lists(st.integers(-1, 10**20), max_size=3) | TREES,
    "gate": st.dictionaries(WORDS, RULES | st.dictionaries(WORDS, RULES, max_size=2), max_size=2) | TREES,
    "given": st.dictionaries(WORDS, GIVEN | TREES, max_size=2),
}
VARIANTS = st.dictionaries(st.sampled_from(["plain", "lean", "a.b", "1"]), STEPS, min_size=1, max_size=2) | TREES
RECIPES = st.one_of(
    st.fixed_dictionaries({"workload": REF, "steps": STEPS}, optional=EXTRAS),
    st.fixed_dictionaries({"workload": REF, "variants": VARIANTS}, optional=EXTRAS),
    st.fixed_dictionaries({"workload": WORDS, "techniques": st.lists(REF, max_size=3)}, optional=EXTRAS),
)


def reads(read: Callable[[], Recipe]) -> Recipe | None:
    """A recipe that can be written and read again as the same, or `None` where the user's mistake is named."""
    try:
        recipe = read()
    except CupelError as error:
        assert error.exit_code == 2 and " must " in str(error), repr(error)
        return None
    assert isinstance(recipe, Recipe) and recipe.variants and len(set(recipe.seeds)) == len(recipe.seeds) > 0
    assert all(rule.variant in recipe.variants for rule in recipe.gate)
    return recipe


def reads_file(path: Path, text: str | bytes, changes: tuple[str, ...] = ()) -> Recipe | None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return reads(lambda: read_recipe(path, changes))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "r.yaml"


@KEEN
@given(text=st.text(max_size=200))
def test_random_text(path: Path, text: str) -> None:
    reads_file(path, text)


@KEEN
@given(data=st.binary(max_size=120))
def test_random_bytes(path: Path, data: bytes) -> None:
    reads_file(path, data)


@KEEN
@given(text=st.text(alphabet="workload: digts-cn\n[]{}&*!|>'\"%@`#?,-~<=0123456789.\t", max_size=80))
def test_random_yaml(path: Path, text: str) -> None:
    reads_file(path, "workload: digits-cnn\nsteps: [fit]\n" + text)


@settings(KEEN, max_examples=200)
@given(recipe=RECIPES)
def test_random_recipes_in_python(recipe: dict[str, object]) -> None:
    reads(lambda: recipe_of(**recipe))


@settings(KEEN, max_examples=150)
@given(recipe=RECIPES)
def test_random_recipes_in_yaml(path: Path, recipe: dict[str, object]) -> None:
    """What is read from YAML is resolved to a recipe that reads as the same one."""
    found = reads_file(path, yaml.safe_dump(recipe))
    if found is not None:
        again = reads_file(path, yaml.safe_dump(found.plain()))
        assert again is not None and again.plain() == found.plain()


@settings(KEEN, max_examples=100)
@given(value=TREES)
def test_any_value_as_keywords(value: object) -> None:
    for key in ("workload", "steps", "variants", "techniques", "probes", "seeds", "given", "gate"):
        reads(lambda key=key: recipe_of(**{"workload": "digits-cnn", "steps": ["fit"], key: value}))


@settings(KEEN, max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_mutated_recipes(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    text = list(draw.choice(GOOD))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text))
        kind = draw.randrange(5)
        if kind == 0:
            text[at] = draw.choice("\0\t\n:{}[]&*!#|>-'\"%, \x85\ufeff²e.=0x")
        elif kind == 1:
            del text[at : at + draw.randint(1, 15)]
        elif kind == 2:
            text[at:at] = text[at : at + draw.randint(1, 60)]
        elif kind == 3:
            lines = "".join(text).split("\n")
            draw.shuffle(lines)
            text = list("\n".join(lines)) or ["x"]
        else:
            text[at:at] = list(
                draw.choice(["!!int ''", "!!bool x", "!!float ''", "&a *a", "<<: *x", "? ", "1:30", "0b", "~"])
            )
        text = text or ["x"]
    reads_file(path, "".join(text))


@settings(KEEN, max_examples=150)
@given(
    where=st.lists(WORDS | st.sampled_from(["0", "1", "-1", "²", "٣", "", "99"]), max_size=4).map(".".join)
    | st.text(max_size=12),
    value=st.sampled_from(["1", "[1", "{a: 1}", "", "\0", "!!bool x", "null", "[fit]", "&a [*a]"])
    | st.text(max_size=8),
    equals=st.sampled_from(["=", "=", "=", ""]),
    good=st.sampled_from(GOOD),
)
def test_random_settings(path: Path, where: str, value: str, equals: str, good: str) -> None:
    reads_file(path, good, (where + equals + value,))


@KEEN
@given(rule=RULES)
def test_random_gates(rule: object) -> None:
    recipe = reads(lambda: recipe_of(workload="digits-cnn", variants={"plain": ["fit"]}, gate={"accuracy": rule}))
    if recipe is not None:
        (read,) = recipe.gate
        assert read.op in (">=", "<=", ">", "<") and abs(read.number) < float("inf")
        assert not (read.arith == "/" and read.number == 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workload: digits-cnn\nsteps: [fit]\ngate: {accuracy: '>= 0.9.1'}\n", "must compare with a number"),
        ("workload: digits-cnn\nsteps: [fit]\ngate: {accuracy: '>= model / 0'}\n", "must have a limit"),
        ("workload: digits-cnn\nsteps: [fit]\ngate: {accuracy: '>= 1e999'}\n", "must have a limit"),
        ("workload: digits-cnn\nsteps:\n  - fit: {with: [{pdp: false}]}\n", "must be a mapping; got False"),
        ("workload: digits-cnn\nsteps:\n  - fit: {with: [{pdp: {}, as: 3}]}\n", "`as` must be a name; got 3"),
        ('workload: digits-cnn\nsteps: [fit]\ngiven: {teacher: "a\\0b"}\n', "without zero bytes"),
        ("workload: digits-cnn\nsteps: [fit]\ngiven: {teacher: /dev/zero}\n", "must be under"),
        ("workload: digits-cnn\nsteps: [fit]\nseeds: [!!int '']\n", "must be readable"),
        ("workload: digits-cnn\nsteps: [fit]\nseeds: [!!bool x]\n", "must be readable"),
        ("workload: digits-cnn\x01\nsteps: [fit]\n", "must be YAML text"),
    ],
)
def test_mistakes_that_the_fuzz_found(path: Path, text: str, words: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CupelError) as error:
        read_recipe(path)
    assert words in str(error.value) and error.value.exit_code == 2


def test_values_that_contain_themselves_or_each_other() -> None:
    inside: list[object] = []
    inside.append(inside)
    wide: object = "x"
    for _ in range(30):
        wide = [wide] * 10  # 10^30 values, if they were all visited
    for value in (inside, wide):
        with pytest.raises(CupelError, match="must stay under"):
            recipe_of(workload="digits-cnn", steps=value)


@pytest.mark.parametrize("change", ["steps.²=fit", "steps.9=fit", "workload.x.y=1", "=1", "steps", "workload=\0"])
def test_settings_that_lead_nowhere(path: Path, change: str) -> None:
    path.write_text("workload: digits-cnn\nsteps: [fit]\n", encoding="utf-8")
    with pytest.raises(CupelError, match="must") as error:
        read_recipe(path, (change,))
    assert error.value.exit_code == 2
