"""Stories of family relations in words, and questions that join up to five of their facts."""
import itertools
import random

import numpy as np

WOMEN = ("Ann Eva Alice Beth Clara Diana Emma Fiona Grace Helen Irene Julia Karen Laura Maria Nina Olivia Paula "
         "Rosa Sarah Tina").split()
MEN = ("Bob Cal Dan Adam Brian David Eric Frank George Henry Ivan James Kevin Louis Mark Noah Oscar Peter Robert "
       "Simon Thomas").split()
STEPS = {"parent": ("mother", "father"), "child": ("daughter", "son"), "sibling": ("sister", "brother"),
         "spouse": ("wife", "husband")}                               # what facts say of a woman, of a man
BACK = dict(parent="child", child="parent", sibling="sibling", spouse="spouse")
KIN = {   # what a woman or a man is called by whom these steps lead to her or him
    **{words: [step] for step, words in STEPS.items()},
    ("grandmother", "grandfather"): ["parent parent"],
    ("granddaughter", "grandson"): ["child child"],
    ("great-grandmother", "great-grandfather"): ["parent parent parent"],
    ("great-granddaughter", "great-grandson"): ["child child child"],
    ("aunt", "uncle"): ["parent sibling", "parent sibling spouse"],
    ("niece", "nephew"): ["sibling child", "spouse sibling child"],
    ("cousin", "cousin"): ["parent sibling child"],
    ("mother-in-law", "father-in-law"): ["spouse parent"],
    ("daughter-in-law", "son-in-law"): ["child spouse"],
    ("sister-in-law", "brother-in-law"): ["spouse sibling", "sibling spouse"],
}
WORDS = [".", "what is", "to", "?", *(f"is the {word} of" for pair in STEPS.values() for word in pair),
         *dict.fromkeys(word for pair in KIN for word in pair)]       # a token each, as is every name


def great_family(generations, children):
    """A founding couple and all who descend from it, but for the youngest married with as many children each: for every
    person a dict of {step: persons}."""
    people, couples = [], [(0, 1)]

    def add(**steps):
        people.append(dict(parent=(), child=(), sibling=(), spouse=()) | steps)
        return len(people) - 1

    add(spouse=(1,)), add(spouse=(0,))
    for generation in range(1, generations):
        parents, couples = couples, []
        for couple in parents:
            born = [add(parent=couple) for _ in range(children)]
            for child in born:
                people[child]["sibling"] = tuple(other for other in born if other != child)
            for parent in couple:
                people[parent]["child"] = tuple(born)
            if generation < generations - 1:
                couples += [(child, add(spouse=(child,))) for child in born]
        for child, spouse in couples:
            people[child]["spouse"] = (spouse,)
    return people


def walk(people, start, steps):
    """Everyone to whom the steps, separated by spaces, lead from `start`."""
    reached = [start]
    for step in steps.split():
        reached = [person for before in reached for person in people[before][step]]
    return reached


class Kinship:
    """`Ann is the mother of Bob . what is Bob to Ann ? Cal is the brother of Bob . what is Ann to Cal ? ...`: a family
    of PERSONS, told fact by fact, each of one new person, in random order and either way round; after every fact EACH
    questions about those known by then. Their hops are the facts on the only path between the two persons: 1, a fact
    itself or its reverse, to 5; the other facts distract. A "?" has the answer as its target, which is not told."""
    PERSONS, EACH, NAMES, GENERATIONS, CHILDREN = 7, 2, 12, 4, 3      # NAMES of women, and as many of men
    GRADE, GRADES = "hops", (1, 2, 3, 4, 5)
    FACT, QUESTION = 4, 5                                             # tokens in each

    def __init__(self):
        people = great_family(self.GENERATIONS, self.CHILDREN)
        self.spouse = [person["spouse"] for person in people]
        self.near = [[(b, step) for step in STEPS for b in person[step]] for person in people]
        self.kin = [{a: words for words, ways in KIN.items() for way in ways for a in walk(people, c, way)}
                    for c in range(len(people))]                      # kin[c][a]: what a is to c, (woman, man)
        self.names = WOMEN[:self.NAMES], MEN[:self.NAMES]
        words = [*WORDS, *self.names[0], *self.names[1]]
        self.token, self.vocabulary = {word: i for i, word in enumerate(words)}, [word + " " for word in words]
        self.T, self.vocab_size = (self.PERSONS - 1) * (self.FACT + self.EACH * self.QUESTION), len(words)

    def make(self, rng, B):
        """idx, targets and grades (B, T)."""
        rng = random.Random(int(rng.integers(2 ** 63)))               # quicker than NumPy's, a number at a time
        rows = [zip(*self.story(rng)) for _ in range(B)]
        return tuple(map(np.array, zip(*rows)))

    def story(self, rng):
        """A story as T triples: token, target, grade."""
        people, facts, hops = self.tree(rng, self.PERSONS)
        woman, name = self.christen(rng, people)
        story, pairs = [], {}
        for known, fact in enumerate(facts, 2):
            story += [(self.token[word], -1, -1) for word in self.tell(rng, fact, woman, name)]
            for a, c in itertools.product(people[:known], repeat=2):
                n, kin = hops[c][a], self.kin[c].get(a)
                if people[known - 1] in (a, c) and n in self.GRADES and kin:
                    pairs.setdefault(n, {}).setdefault(kin, []).append((a, c))
            for _ in range(self.EACH):
                n = rng.choices(list(pairs), list(pairs))[0]          # many hops more often: few pairs have them
                kin = rng.choice(list(pairs[n]))
                a, c = rng.choice(pairs[n][kin])
                asked = [self.token[word] for word in ("what is", name[a], "to", name[c])]
                story += [(token, -1, -1) for token in asked]
                story.append((self.token["?"], self.token[kin[not woman[a]]], self.GRADES.index(n)))
        return story

    def tree(self, rng, n):
        """n persons who are related, a list; n - 1 facts (person, step from the second to the first, person), each of
        one person more, in the list's order; and the hops between any two, a dict of dicts."""
        people, facts = [rng.randrange(len(self.near))], []
        hops = {people[0]: {people[0]: 0}}
        while len(people) < n:
            old = rng.choice(people)
            person, step = rng.choice(self.near[old])
            if person not in hops:
                facts.append((person, step, old))
                people.append(person)
                hops[person] = {other: far + 1 for other, far in hops[old].items()}
                for other, far in hops[person].items():
                    hops[other][person] = far
                hops[person][person] = 0
        return people, facts, hops

    def christen(self, rng, people):
        """For each person whether she is a woman, and a name of her own. Spouses differ."""
        names = [rng.sample(names, len(names)) for names in self.names]
        woman, name = {}, {}
        for person in people:
            spouse = [woman[other] for other in self.spouse[person] if other in woman]
            woman[person] = not spouse[0] if spouse else rng.random() < 0.5
            name[person] = names[not woman[person]].pop()
        return woman, name

    def tell(self, rng, fact, woman, name):
        """The words of a fact, either way round."""
        a, step, c = fact
        if rng.random() < 0.5:
            a, step, c = c, BACK[step], a
        return [name[a], f"is the {STEPS[step][not woman[a]]} of", name[c], "."]
