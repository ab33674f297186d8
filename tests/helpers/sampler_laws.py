"""The exact law of each sampler's T-step chain on a toy, by enumeration; written apart from the samplers.

A law is {tokens: probability}; a toy has LENGTH tokens of an alphabet of 3 and the mask. Networks are the
exported model with random weights, so that causal and conditioned ones are what they are in earnest.
"""

import itertools
import math
from functools import lru_cache

import numpy as np
import torch

from megatron_dlm.conversion.hugging_face_model.configuration_megatron_dlm import MegatronDlmConfig
from megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm import MegatronDlmModel
from megatron_dlm.conversion.to_hugging_face import hugging_face_fields
from megatron_dlm.interfaces import Vocabulary
from megatron_dlm.models.config import ModelConfig
from tests.helpers.weights import random_state

LENGTH, MASK = 3, 1
VOCABULARY = Vocabulary(size=4, mask_token_id=MASK, eos_token_id=3, bos_token_id=0)
MODEL = ModelConfig(
    num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, conditioning_size=4
)
TOKENS = [v for v in range(VOCABULARY.size) if v != MASK]


def toy(objective):
    fields = hugging_face_fields(MODEL, VOCABULARY, objective)
    model = MegatronDlmModel(MegatronDlmConfig(**fields, max_position_embeddings=LENGTH)).eval()
    model.load_state_dict(random_state(MODEL, VOCABULARY.size, seed=3, scale=0.7))
    # Predictions that differ from text to text and are sure of nothing.
    texts = torch.tensor(list(itertools.product(range(VOCABULARY.size), repeat=LENGTH)))
    with torch.no_grad():
        logits = model(texts).logits[..., TOKENS]
        head = model.output_layer.linear
        head.weight.div_(logits.std(0).mean())
        head.bias.zero_()
        head.bias.sub_(model(texts).logits.mean((0, 1)).nan_to_num(neginf=0.0))
    return model


class Laws:
    """Laws of one toy network; temperature and nucleus are applied to its predictions here, too."""

    def __init__(self, model, *, temperature=1.0, top_p=1.0, alpha_of=None):
        self._model = model
        self._temperature, self._top_p = temperature, top_p
        self._alpha_of = alpha_of or (lambda t: 1 - 0.999 * t)
        self._predict = lru_cache(maxsize=None)(self._predict_once)

    @torch.no_grad()
    def _predict_once(self, ids, positions, sigma):
        logits = self._model(
            torch.tensor([ids]),
            sigma=None if sigma is None else torch.tensor([sigma], dtype=torch.float32),
            position_ids=torch.tensor([positions]),
        ).logits[0]
        return [self.sharpened(row) for row in logits.double().numpy()]

    def sharpened(self, logits):
        p = np.exp((logits - logits.max()) / self._temperature)
        p = p / p.sum()
        if self._top_p < 1:
            kept, held = np.zeros_like(p), 0.0
            for v in np.argsort(-p):
                if held <= self._top_p:
                    kept[v] = p[v]
                held += p[v]
            p = kept / kept.sum()
        return p

    def predict(self, ids, positions=None, sigma=None):
        """[L][V] probabilities."""
        return self._predict(tuple(ids), tuple(positions or range(len(ids))), sigma)

    # ---- plans: lists of (probability, groups of positions)

    def by_plan(self, plans, family, given=()):
        """Law of revealing group after group; `given` are the first tokens."""
        law = {}
        for probability, groups in plans:
            for tokens, p in self._reveal(groups, family, dict(enumerate(given))).items():
                law[tokens] = law.get(tokens, 0.0) + probability * p
        return law

    def _reveal(self, groups, family, known):
        """Tokens of the remaining groups given what is known (in the order in which it became known)."""
        if not groups:
            return {tuple(known[p] for p in range(LENGTH)): 1.0}
        group, law = groups[0], {}
        predictions = self._of_group(group, family, known)
        for values in itertools.product(range(VOCABULARY.size), repeat=len(group)):
            p = math.prod(row[v] for row, v in zip(predictions, values, strict=True))
            if p == 0:
                continue
            after = self._reveal(groups[1:], family, known | dict(zip(group, values, strict=True)))
            for tokens, rest in after.items():
                law[tokens] = law.get(tokens, 0.0) + p * rest
        return law

    def _of_group(self, group, family, known):
        if family == "ar":
            (position,) = group
            return [self.predict([known[p] for p in range(position)])[position - 1]]
        if family == "esolm":
            # In the order of revealing, the group's masks behind what is known.
            order = [*known, *group]
            ids = [known.get(p, MASK) for p in order]
            return self.predict(ids, order)[len(known) :]
        found = self.predict([known.get(p, MASK) for p in range(LENGTH)])
        return [found[p] for p in group]

    # ---- samplers whose next step depends on the state

    def confidence(self, num_steps):
        law = {(MASK,) * LENGTH: 1.0}
        for step in range(num_steps):
            wanted = LENGTH * (step + 1) // num_steps - LENGTH * step // num_steps
            after = {}
            for state, probability in law.items():
                masked = [p for p in range(LENGTH) if state[p] == MASK]
                predictions = self.predict(state)
                for values in itertools.product(range(VOCABULARY.size), repeat=len(masked)):
                    drawn = dict(zip(masked, values, strict=True))
                    p = probability * math.prod(predictions[q][v] for q, v in drawn.items())
                    if p == 0:
                        continue
                    # Equal but for rounding: the leftmost first.
                    surest = sorted(masked, key=lambda q: (-round(predictions[q][drawn[q]] * 2**16), q))[
                        :wanted
                    ]
                    new = tuple(drawn[q] if q in surest else state[q] for q in range(LENGTH))
                    after[new] = after.get(new, 0.0) + p
            law = after
        return law

    def remasking(self, steps, *, by_confidence=False, greedy_tail=False):
        """Masked chain of steps (alpha_t, alpha_s, sigma); its state: tokens and their probabilities."""
        law = {((MASK,) * LENGTH, (0.0,) * LENGTH): 1.0}
        for index, (alpha_t, alpha_s, sigma) in enumerate(steps):
            after = {}
            for (state, sure), probability in law.items():
                predictions = self.predict(state)
                sampled = [p for p in range(LENGTH) if state[p] != MASK]
                total = sum(math.exp(-sure[p]) for p in sampled)
                cells = []
                for p in range(LENGTH):
                    own = sigma * math.exp(-sure[p]) / total if by_confidence and p in sampled else sigma
                    if p in sampled:
                        cells.append([(state[p], sure[p], 1 - own), (MASK, 0.0, own)])
                        continue
                    stays = (1 - alpha_s - (0.0 if by_confidence else sigma) * alpha_t) / (1 - alpha_t)
                    drawn = predictions[p]
                    if greedy_tail and index == len(steps) - 1:
                        drawn = np.eye(VOCABULARY.size)[drawn.argmax()]
                    cells.append([(MASK, 0.0, stays)])
                    cells[-1] += [(v, predictions[p][v], (1 - stays) * drawn[v]) for v in TOKENS]
                for values in itertools.product(*cells):
                    p = probability * math.prod(value[2] for value in values)
                    if p > 0:
                        key = tuple(value[0] for value in values), tuple(value[1] for value in values)
                        after[key] = after.get(key, 0.0) + p
            law = after
        tokens = {}
        for (state, _), p in law.items():
            tokens[state] = tokens.get(state, 0.0) + p
        return tokens

    def above_threshold(self, threshold, given=()):
        """Law of keeping each token above a probability and the surest one, from left to right if equal."""
        start, law = (*given, *[MASK] * (LENGTH - len(given))), {}
        states = {start: 1.0}
        while states:
            state, probability = states.popitem()
            masked = [p for p in range(LENGTH) if state[p] == MASK]
            if not masked:
                law[state] = law.get(state, 0.0) + probability
                continue
            predictions = self.predict(state)
            for values in itertools.product(TOKENS, repeat=len(masked)):
                drawn = dict(zip(masked, values, strict=True))
                sure = {q: round(predictions[q][v] * 2**16) for q, v in drawn.items()}
                surest = min(masked, key=lambda q: (-sure[q], q))
                kept = [q for q in masked if q == surest or sure[q] > threshold * 2**16]
                new = tuple(drawn[q] if q in kept else state[q] for q in range(LENGTH))
                p = probability * math.prod(predictions[q][v] for q, v in drawn.items())
                states[new] = states.get(new, 0.0) + p
        return law

    def uniform(self, times, *, states, greedy_tail=False, wrong=False, kappa=1.0):
        """Duo's chain; `kappa` as in a Psi-sampler.

        `wrong` leaves alpha_t / alpha_s out of what stays, and takes the prediction for q(z_0 | z_t).
        """
        prior = np.array([1.0 / len(states) if v in states else 0.0 for v in range(VOCABULARY.size)])
        law = {z: len(states) ** -LENGTH for z in itertools.product(states, repeat=LENGTH)}
        for index, (t, s) in enumerate(itertools.pairwise(times)):
            last = index == len(times) - 2
            alpha_t, alpha_s = self._alpha_of(t), 1.0 if last else self._alpha_of(s)
            after = {}
            for z, probability in law.items():
                predictions = self.predict(z, sigma=-math.log(alpha_t))
                if last and greedy_tail:
                    rows = [np.eye(VOCABULARY.size)[p.argmax()] for p in predictions]
                else:
                    rows = []
                    for token, prediction in zip(z, predictions, strict=True):
                        reverse = posterior(token, prediction, alpha_t, alpha_s, states, wrong)
                        clean = prediction if wrong else posterior(token, prediction, alpha_t, 1.0, states)
                        rows.append(kappa * reverse + (1 - kappa) * (alpha_s * clean + (1 - alpha_s) * prior))
                for values in itertools.product(range(VOCABULARY.size), repeat=LENGTH):
                    p = math.prod(row[v] for row, v in zip(rows, values, strict=True))
                    if p:
                        after[values] = after.get(values, 0.0) + probability * p
            law = after
        return law


def posterior(z, prediction, alpha_t, alpha_s, states, wrong=False):
    """q(z_s | z_t, x_theta), ALGORITHMS: the published formula over the states."""
    count, size = len(states), len(prediction)
    here = np.eye(size)[z]
    prior = np.array([1.0 / count if v in states else 0.0 for v in range(size)])
    ratio = 1.0 if wrong else alpha_t / alpha_s
    q = (
        count * alpha_t * prediction * here
        + (ratio - alpha_t) * here
        + (alpha_s - alpha_t) * prediction
        + (1 - alpha_t / alpha_s) * (1 - alpha_s) * prior
    )
    return q / q.sum()


def ancestral_plans(alphas, num_left_to_right=False):
    """Every assignment of positions to steps with every order inside steps, and its probability."""
    reveal = [(s - t) / (1 - t) for t, s in itertools.pairwise(alphas)]
    plans = []
    left_over = len(reveal)
    for steps in itertools.product(range(left_over + 1), repeat=LENGTH):
        probability = 1.0
        for step in steps:
            for earlier in range(min(step, left_over)):
                probability *= 1 - reveal[earlier]
            if step < left_over:
                probability *= reveal[step]
        if probability <= 0:
            continue
        groups = [[p for p in range(LENGTH) if steps[p] == step] for step in range(left_over)]
        rest = [[p] for p in range(LENGTH) if steps[p] == left_over]
        orders = list(itertools.product(*(itertools.permutations(g) for g in groups if g)))
        plans += [(probability / len(orders), [*map(list, order), *rest]) for order in orders]
    return plans


def p_value(samples, law):
    """Chi-square of drawn tokens (int [N, LENGTH]) against a law; cells below 5 expected are joined."""
    count = len(samples)
    keys, counts = np.unique(np.asarray(samples), axis=0, return_counts=True)
    seen = {tuple(int(v) for v in key): int(n) for key, n in zip(keys, counts, strict=True)}
    if any(law.get(key, 0.0) == 0.0 for key in seen):
        return 0.0
    assert abs(sum(law.values()) - 1) < 1e-9
    cells = [(count * p, seen.get(key, 0)) for key, p in law.items() if p > 0]
    rare = [cell for cell in cells if cell[0] < 5]
    cells = [cell for cell in cells if cell[0] >= 5]
    if rare:
        cells.append(tuple(map(sum, zip(*rare, strict=True))))
    statistic = sum((n - e) ** 2 / e for e, n in cells if e > 0)
    degrees = max(1, len(cells) - 1)
    return float(torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2)))
