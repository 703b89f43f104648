"""The whole GPT: its config, its blocks, its loss, and how it generates text.

    model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=16))
    logits, loss = model(idx, targets)             # each position predicts the next token
    idx = model.generate(idx, max_new_tokens=100)  # one token after another

Read it from top to bottom: config, attention, MLP, block, GPT, loss; then sampling; then `Bigram`,
the smallest language model there is. Nothing here knows of flags, datasets or optimizers.

The architecture is GPT-2's: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners". Attention: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from quantize import MAX_LOGITS, ChunkedLoss

# Sizes by name: (n_layer, n_head, n_embd). GPT-3's are table 2.1 of Brown et al. 2020,
# arXiv:2005.14165, except 1.3b and 13b, whose printed numbers do not divide into heads.
MODEL_SIZES = {
    'gpt2': (12, 12, 768),
    'gpt2-medium': (24, 16, 1024),
    'gpt2-large': (36, 20, 1280),
    'gpt2-xl': (48, 25, 1600),
    'gpt3-125m': (12, 12, 768),
    'gpt3-350m': (24, 16, 1024),
    'gpt3-760m': (24, 16, 1536),
    'gpt3-1.3b': (24, 16, 2048),
    'gpt3-2.7b': (32, 32, 2560),
    'gpt3-6.7b': (32, 32, 4096),
    'gpt3-13b': (40, 40, 5120),
    'gpt3-175b': (96, 96, 12288),
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, in one line, for a shape that is impossible."""

    block_size: int = 1024  # the context: how many tokens the model can look back on
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 ids padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; without is a bit faster
    gelu: str = 'erf'  # 'erf' is the exact GELU; OpenAI's GPT-2 weights want the 'tanh' form

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f'{name} is {value!r}: it must be a whole number from 1 up')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}: it must be at least 0 and below 1')
        if self.gelu not in ('erf', 'tanh'):
            raise ValueError(f"gelu is {self.gelu!r}: it must be 'erf' or 'tanh'")


def attention(q, k, v, dropout=0.0):
    """Causal attention: softmax(q k^T / sqrt(head_size) + mask) v.

    q: (B, n_head, T, head_size); k, v: (B, n_head, S, head_size), S >= T. The queries belong to
    the last T of the S positions. Returns (B, n_head, T, head_size). Each query scores all keys;
    the mask hides those after its own position; softmax turns the scores into weights; the result
    is the weighted mean of the values (Vaswani et al. 2017, section 3.2.1).
    """
    T, S = q.size(2), k.size(2)
    q = q.to(k.dtype)  # a cache may hold another dtype than the model's
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and S <= 512:
        # Spelled out, since for short contexts torch's fused kernel takes longer on a CPU in bf16.
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, n_head, T, S)
        mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device)
        scores += mask.triu(diagonal=S - T + 1)
        weights = F.dropout(F.softmax(scores, dim=-1), dropout)  # each row sums to 1
        return weights @ v  # (B, n_head, T, head_size)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    mask = None  # one token, the latest, may look at everything
    if T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Causal multi-head self-attention: tokens take from earlier ones what they need."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        """(B, T, n_embd) to the same shape. cache: a KVCache with the tokens before these."""
        B, T, C = x.shape  # batch, time, channels
        head_size = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        v = v.view(B, T, self.n_head, head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_head, S, head_size)
        y = attention(q, k, v, self.dropout if self.training else 0.0).to(q.dtype)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network: four times wider, a nonlinearity, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """x + attention, then x + MLP, each of the normalized residual stream x.

    The norm comes first ("pre-norm"), so the stream itself is never rescaled: Xiong et al. 2020,
    arXiv:2002.04745.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class LanguageModel(nn.Module):
    """What all models share; each has its own `forward(idx, targets, cache, loss_only)`."""

    blocks = ()  # of the transformer, in order; a Bigram has none

    def num_params(self):
        """Number of weights, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def init_weights(self):
        """Draw all weights, one after the other, by the model's `init_parameter`."""
        for name, p in self.named_parameters():
            self.init_parameter(name, p)

    def init_parameter(self, name, p):
        """GPT-2's initialization: matrices of standard deviation 0.02, biases 0, norms 1.

        Each block adds twice to the residual stream. The 2 n_layer projections that do start
        smaller by a factor of sqrt(2 n_layer), so that their sum doesn't depend on n_layer.
        """
        if name.endswith(('c_proj.weight', 'o_proj.weight', 'down_proj.weight')):
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
        elif p.dim() >= 2:
            nn.init.normal_(p, std=0.02)
        else:
            nn.init.constant_(p, 0.0 if name.endswith('bias') else 1.0)

    def positions(self, idx, cache):
        """Positions of `idx` in the context, (T,) int64. Raises ValueError past block_size."""
        start = cache[0].length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f'{end} tokens do not fit the context of block_size='
                             f'{self.config.block_size}: pass the last ones only')
        return torch.arange(start, end, device=idx.device)

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """A model with weights from Hugging Face: see `export_hf.read_pretrained`."""
        from export_hf import read_pretrained  # here, since it imports this file

        return read_pretrained(cls, name, dropout)

    def new_cache(self, room):
        """An empty KVCache for each block, of at most `room` tokens; a Bigram needs none."""
        return [KVCache(room) for _ in self.blocks]

    def flops_per_token(self):
        """Floating-point operations to train on one token: forward and backward.

        6 for each parameter of a Linear and 12 n_layer n_embd T for attention: Chowdhery et al.
        2022 (PaLM), arXiv:2204.02311, appendix B. Embeddings are only looked up.
        """
        c = self.config
        weights = sum(p.numel() for module in self.modules() if isinstance(module, nn.Linear)
                      for p in module.parameters())
        width = c.n_head * getattr(c, 'head_size', c.n_embd // c.n_head)
        return 6 * weights + 12 * len(self.blocks) * width * c.block_size

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **kwargs):
        """Append `max_new_tokens` to every row of `idx`: (B, T) int64 to (B, T + max_new_tokens).

        The other arguments are those of `stream`, below, which has the loop.
        """
        tokens = stream(self, idx, max_new_tokens, temperature, top_k, top_p, **kwargs)
        return torch.cat([idx, *tokens], dim=1)


class GPT(LanguageModel):
    """GPT-2: token and position embeddings, n_layer blocks, a norm, and logits over the tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd),
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix reads tokens and predicts them: Press & Wolf 2017, arXiv:1608.05859.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @property
    def blocks(self):
        return self.transformer.h

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """Predict the token after each of `idx`.

        idx: (B, T) int64 ids. targets: (B, T) int64, the ids that did come next; -1: not counted.
        cache: from `new_cache`; `idx` then holds only the tokens not read before.

        Returns (logits, loss). With targets: logits (B, T, vocab_size) and the mean cross-entropy
        in nats, a float32 scalar; None and the loss if `loss_only`, which may save much memory.
        Without: the last position's logits, (B, 1, vocab_size), and None. Raises ValueError if the
        context would be longer than block_size.
        """
        positions = self.positions(idx, cache)  # (T,)
        token_embedding = self.transformer.wte(idx)  # (B, T, n_embd)
        position_embedding = self.transformer.wpe(positions)  # (T, n_embd), the same for all B
        x = self.transformer.drop(token_embedding + position_embedding)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None)  # (B, T, n_embd)
        x = self.transformer.ln_f(x)
        return logits_and_loss(x, self.lm_head, targets, loss_only)


def logits_and_loss(x, lm_head, targets, loss_only):
    """What `GPT.forward` returns. x: what the head takes, (B, T, n_embd), or a Bigram's ids."""
    if targets is None:
        return lm_head(x[:, [-1]]), None
    plain = isinstance(lm_head, nn.Linear)  # not in 8 bits, packed, or a Bigram's table
    if loss_only and plain and targets.numel() * lm_head.out_features > MAX_LOGITS:
        # As a rule with GPT-2's vocabulary: the same loss, without all logits in memory at once.
        return None, ChunkedLoss.apply(x.flatten(0, 1), lm_head.weight, targets.flatten())
    logits = lm_head(x)
    return (None if loss_only else logits), next_token_loss(logits, targets)


def next_token_loss(logits, targets):
    """Mean cross-entropy in nats: logits (..., V), targets (...) int64; -1: not counted."""
    logits = logits.flatten(0, -2).float()  # bf16 has too few digits for a log-sum-exp
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction='sum')
    return total / (targets != -1).sum().clamp(min=1)  # reduction='mean' is NaN if none counts


# --- sampling


class KVCache:
    """Keys and values of one attention layer, for the tokens read so far, at most `room`."""

    def __init__(self, room):
        self.room, self.kv = room, None
        self.length = 0  # positions filled

    def append(self, k, v):
        """Add k and v; return all S keys and values so far, each (B, heads, S, head_size)."""
        if self.kv is None:
            B, heads, _, head_size = k.shape
            # In float32, attention for a single query is faster on a CPU.
            dtype = torch.float32 if k.device.type == 'cpu' else k.dtype
            self.kv = k.new_empty((2, B, heads, self.room, head_size), dtype=dtype)
        start, self.length = self.length, self.length + k.size(2)
        self.kv[0, :, :, start : self.length] = k
        self.kv[1, :, :, start : self.length] = v
        return self.kv[:, :, :, : self.length]


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
           vocab_size=None):
    """Yield the next tokens of the B texts in `idx`, a (B, 1) int64 tensor at a time.

    idx: (B, T) int64, T >= 1. temperature, top_k, top_p: see `sample_from`. generator: a
    torch.Generator on the device of `idx`, for reproducible samples. vocab_size: ids from here on
    are padding of the embedding, and are never chosen.

    The prompt is read once, then each step reads one token and finds the earlier ones in the
    cache. Cached keys carry their positions, so a full window can't just slide: its most recent
    half is read anew, which costs one pass over block_size / 2 tokens every block_size / 2 steps
    or so. Of a prompt longer than block_size, the end is kept.
    """
    was_training = model.training
    model.eval()
    block_size = model.config.block_size
    window = unread = idx[:, -block_size:]
    room = min(block_size, window.size(1) + max_new_tokens)
    cache = model.new_cache(room)
    try:
        for _ in range(max_new_tokens):
            logits, _ = model(unread, cache=cache)
            logits = logits[:, -1, :vocab_size].float()
            unread = sample_from(logits, temperature, top_k, top_p, generator)
            yield unread
            window = torch.cat([window, unread], dim=1)
            if window.size(1) > block_size:
                window = unread = window[:, -max(1, block_size // 2) :]
                cache = model.new_cache(room)
    finally:
        model.train(was_training)


def sample_from(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Choose one token for each row: logits (B, V) float32 to ids (B, 1) int64.

    temperature: below 1 sharpens, above 1 flattens, 0 takes the likeliest token. top_k: only the k
    likeliest tokens count (Fan et al. 2018, arXiv:1805.04833). top_p: only the likeliest tokens
    that together reach probability p do (nucleus sampling: Holtzman et al. 2019,
    arXiv:1904.09751). Raises ValueError for values outside their range.
    """
    if not temperature >= 0:
        raise ValueError(f'temperature is {temperature}: it must be 0 (greedy) or above')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k is {top_k}: it must be at least 1, or None for all tokens')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'top_p is {top_p}: it must be above 0 and at most 1')
    if temperature < 1e-6:  # 0, or so little that the logits would overflow
        return logits.argmax(dim=-1, keepdim=True)
    ids = None  # which token each column stands for, once they are not all there in order
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        # A token stays if those ahead of it have not reached p yet, so the first always stays.
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)
    return choice if ids is None else ids.gather(-1, choice)


# --- the baseline


class Bigram(LanguageModel):
    """A table of logits for the next token given the last one alone: the baseline to beat."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        self.init_weights()

    def init_parameter(self, name, p):
        nn.init.zeros_(p)  # every next token is equally likely: the loss is ln vocab_size

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """As `GPT.forward`, for any number of tokens; there is nothing to cache."""
        return logits_and_loss(idx, self.table, targets, loss_only)
