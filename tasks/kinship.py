"""Stories of family relations in words, and questions that join two to five of their facts."""
import random

import numpy as np

WOMEN = ("Ann Eva Alice Beth Clara Diana Emma Fiona Grace Helen Irene Julia Karen Laura Maria Nina Olivia Paula Rosa Sarah "
         "Tina").split()
MEN = ("Bob Cal Dan Adam Brian David Eric Frank George Henry Ivan James Kevin Louis Mark Noah Oscar Peter Robert Simon "
       "Thomas").split()
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
    """`Ann is the mother of Bob . Cal is the brother of Bob . ... what is Ann to Cal ?`: facts of one family, which join
    any two of its PERSONS by one path, among facts of STRANGERS, another family's; then questions, EACH for every number
    of hops, the facts on the path. A "?" has the answer as its target. Facts stand in random order, either way round."""
    PERSONS, STRANGERS, EACH, NAMES = 9, 3, 2, 21                     # NAMES of women, and as many of men
    GENERATIONS, CHILDREN = 4, 3
    GRADE, GRADES = "hops", (2, 3, 4, 5)
    VALIDATION = (0, 0, 0, 0, 1)                                      # no (seed, step, number) begins like this

    def __init__(self):
        people = great_family(self.GENERATIONS, self.CHILDREN)
        self.spouse = [person["spouse"] for person in people]
        self.near = [[(b, step) for step in STEPS for b in person[step]] for person in people]
        self.kin = [{a: words for words, ways in KIN.items() for way in ways for a in walk(people, c, way)}
                    for c in range(len(people))]                      # kin[c][a]: what a is to c, (woman, man)
        self.names = WOMEN[:self.NAMES], MEN[:self.NAMES]
        words = [*WORDS, *self.names[0], *self.names[1]]
        self.token, self.vocabulary = {word: i for i, word in enumerate(words)}, [word + " " for word in words]
        self.n_facts = self.PERSONS - 1 + max(0, self.STRANGERS - 1)
        self.T, self.vocab_size = 4 * self.n_facts + 5 * self.EACH * len(self.GRADES), len(words)

    def make(self, rng, B):
        """idx, targets and grades (B, T)."""
        rng = random.Random(int(rng.integers(2 ** 63)))               # quicker than NumPy's, a number at a time
        stories = [self.story(rng) for _ in range(B)]
        idx = np.array([[self.token[word] for word in words] for words, _ in stories])          # (B, T)
        targets, grades, start = np.full_like(idx, -1), np.full_like(idx, -1), 4 * self.n_facts + 4
        targets[:, start::5] = [[self.token[answer] for answer, _ in answers] for _, answers in stories]
        grades[:, start::5] = [[self.GRADES.index(hops) for _, hops in answers] for _, answers in stories]
        return idx, targets, grades

    def story(self, rng):
        """The tokens of a story, a list, and for each of its questions the answer and the number of hops."""
        for _ in range(1000):                                         # four families of five will do
            people, facts, hops = self.tree(rng, self.PERSONS)
            if questions := self.choose(rng, people, hops):
                break
        else:
            raise ValueError(f"{self.PERSONS} persons never allow {self.EACH} questions for each of {self.GRADES} hops")
        names = [rng.sample(names, len(names)) for names in self.names]
        woman, name = self.christen(rng, people, names)
        told = [self.tell(rng, fact, woman, name) for fact in facts]
        if self.STRANGERS > 1:
            people, facts, _ = self.tree(rng, self.STRANGERS)
            strangers = self.christen(rng, people, names)
            told += [self.tell(rng, fact, *strangers) for fact in facts]
        rng.shuffle(told)
        words = [word for fact in told for word in fact]
        for a, c, *_ in questions:
            words += ["what is", name[a], "to", name[c], "?"]
        return words, [(kin[not woman[a]], n) for a, c, kin, n in questions]

    def tree(self, rng, n):
        """n persons who are related, a list; n - 1 facts (person, step from the second to the first, person), which
        join them as a tree; and the hops between any two (by their places in the list), (n, n)."""
        people, facts, hops = [rng.randrange(len(self.near))], [], [[0]]
        while len(people) < n:
            i = rng.randrange(len(people))
            person, step = rng.choice(self.near[people[i]])
            if person not in people:
                facts.append((person, step, people[i]))
                people.append(person)
                row = [1 + h for h in hops[i]]
                hops = [old + [h] for old, h in zip(hops, row)] + [row + [0]]
        return people, facts, hops

    def choose(self, rng, people, hops):
        """Questions (a, c, what a is to c, hops) in random order, EACH for every number of hops; kinds of kin as equally
        often as they can. None if the family has too few."""
        pairs = {n: {} for n in self.GRADES}
        for c, row in zip(people, hops):
            for a, n in zip(people, row):
                if n in pairs and a in self.kin[c]:
                    pairs[n].setdefault(self.kin[c][a], []).append((a, c))
        questions = []
        for n, kinds in pairs.items():
            if sum(map(len, kinds.values())) < self.EACH:
                return None
            for _ in range(self.EACH):
                kin = rng.choice(list(kinds))
                a, c = kinds[kin].pop(rng.randrange(len(kinds[kin])))
                questions.append((a, c, kin, n))
                if not kinds[kin]:
                    del kinds[kin]
        rng.shuffle(questions)
        return questions

    def christen(self, rng, people, names):
        """For each person whether she is a woman, and a name taken from `names`, (women's, men's). Spouses differ."""
        woman, name = {}, {}
        for person in people:
            spouse = [woman[other] for other in self.spouse[person] if other in woman]
            woman[person] = not spouse[0] if spouse else rng.random() < 0.5
            name[person] = names[not woman[person]].pop()
        return woman, name

    def tell(self, rng, fact, woman, name):
        """The four tokens of a fact, either way round."""
        a, step, c = fact
        if rng.random() < 0.5:
            a, step, c = c, BACK[step], a
        return [name[a], f"is the {STEPS[step][not woman[a]]} of", name[c], "."]
