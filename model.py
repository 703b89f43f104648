"""The whole GPT: its config, its blocks, its loss, and how it generates text.

    model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=16))
    logits, loss = model(idx, targets)             # each position predicts the next token
    idx = model.generate(idx, max_new_tokens=100)  # one token after another

From top to bottom: config, layers, attention, MLP, block, GPT, loss; then sampling; then `Bigram`,
the smallest language model there is. The file needs only torch, so it can be copied.

The architecture is GPT-2's: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners". Attention is from Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


def check_sizes(config):
    """Raise ValueError for sizes that no model can have."""
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f'{name} is {value!r}: it must be a whole number from 1 up')
    if config.n_embd % config.n_head:
        raise ValueError(f'n_embd={config.n_embd} must be a multiple of n_head={config.n_head}')
    if not 0 <= config.dropout < 1:
        raise ValueError(f'dropout is {config.dropout}: it must be at least 0 and below 1')


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError if the sizes don't fit together."""

    block_size: int = 1024  # the context: how many tokens the model can look back on
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 ids padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; False is slightly faster
    gelu: str = 'erf'  # 'erf' is the exact GELU; OpenAI's GPT-2 weights need the 'tanh' form

    def __post_init__(self):
        check_sizes(self)
        if self.gelu not in ('erf', 'tanh'):
            raise ValueError(f"gelu is {self.gelu!r}: it must be 'erf' or 'tanh'")


# A layer initializes its weights when it is created: there is no later pass over the model.
class Linear(nn.Linear):
    """nn.Linear with GPT-2's initialization: weights of standard deviation `std`, biases 0."""

    def __init__(self, n_in, n_out, bias, std=0.02):
        self.std = std  # first, since nn.Linear's __init__ calls reset_parameters
        super().__init__(n_in, n_out, bias)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding with GPT-2's initialization: standard deviation 0.02."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)


def residual_std(config):
    """Standard deviation for a projection that adds to the residual stream.

    Each block has two of them. They start smaller by sqrt(2 * n_layer), so that the variance of
    their sum does not grow with depth.
    """
    return 0.02 / math.sqrt(2 * config.n_layer)


def attention(q, k, v, dropout=0.0):
    """Causal attention: softmax(q k^T / sqrt(head_size) + mask) v.

    q: (B, n_head, T, head_size), for the last T of S positions; k, v: (B, n_head, S, head_size).
    Returns (B, n_head, T, head_size). Each query scores all keys; the mask hides those after its
    own position; softmax turns the scores into weights; the result is the weighted mean of the
    values (Vaswani et al. 2017, section 3.2.1). An edit belongs in both forms below.
    """
    T, S = q.size(2), k.size(2)
    if q.device.type != 'cpu' or q.dtype != torch.bfloat16 or S > 512:
        if T == S:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mask = None  # a single query is the last position: nothing to mask
        if T > 1:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # On a CPU in bf16, plain products are faster for short contexts. This is the formula itself.
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, n_head, T, S)
    mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device)
    scores += mask.triu(diagonal=S - T + 1)  # 0 up to its own position, -inf after it
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)  # each row sums to 1
    return weights @ v  # (B, n_head, T, head_size)


class Attention(nn.Module):
    """Causal self-attention: each token gathers information from itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias, residual_std(config))
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        """(B, T, n_embd) to the same shape. cache: a KVCache with the tokens before these."""
        B, T, C = x.shape  # batch, time, channels
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_size)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_head, S, head_size)
        y = attention(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, n_head, T, head_size) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Feed-forward network for each position alone: to four times the width, GELU, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias, residual_std(config))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, n_embd) to the same shape
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """x = x + attention(norm(x)), then x = x + MLP(norm(x)).

    The norm comes first ("pre-norm"), so the residual stream x itself is never rescaled: Xiong et
    al. 2020, arXiv:2002.04745.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):  # (B, T, n_embd) to the same shape
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class LanguageModel(nn.Module):
    """Base class of GPT, Llama and Bigram. `config` must have block_size and vocab_size."""

    blocks = ()  # the transformer blocks, in order; a Bigram has none

    def num_params(self):
        """Number of weights, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def positions(self, idx, cache):
        """Positions of `idx` in the context, (T,) int64. Raises ValueError past block_size."""
        start = cache[0].length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f'{end} tokens do not fit the context: pass only the last '
                             f'block_size={self.config.block_size}')
        return torch.arange(start, end, device=idx.device)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **kwargs):
        """Append new tokens: (B, T) int64 to (B, T + max_new_tokens). Settings as in `stream`."""
        tokens = stream(self, idx, max_new_tokens, temperature, top_k, top_p, **kwargs)
        return torch.cat([idx, *tokens], dim=1)


# Sizes by name: (n_layer, n_head, n_embd). GPT-3's are from table 2.1 of Brown et al. 2020,
# arXiv:2005.14165, except 1.3b and 13b, where the printed n_embd is not a multiple of n_head.
MODEL_SIZES = {
    'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024),
    'gpt2-large': (36, 20, 1280), 'gpt2-xl': (48, 25, 1600),
    'gpt3-125m': (12, 12, 768), 'gpt3-350m': (24, 16, 1024), 'gpt3-760m': (24, 16, 1536),
    'gpt3-1.3b': (24, 16, 2048), 'gpt3-2.7b': (32, 32, 2560), 'gpt3-6.7b': (32, 32, 4096),
    'gpt3-13b': (40, 40, 5120), 'gpt3-175b': (96, 96, 12288),
}


class GPT(LanguageModel):
    """GPT-2: token and position embeddings, n_layer blocks, a norm, and logits over the tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': Embedding(config.vocab_size, config.n_embd),
            'wpe': Embedding(config.block_size, config.n_embd),
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix reads tokens and predicts them: Press & Wolf 2017, arXiv:1608.05859.
        self.lm_head.weight = self.transformer.wte.weight

    @property
    def blocks(self):
        return self.transformer.h

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """Predict the token after each of `idx`.

        idx: (B, T) int64 ids. targets: (B, T) int64, the ids that came next; -1 is ignored.
        cache: a KVCache for each block; then `idx` holds only the new tokens.

        Returns (logits, loss). With targets: logits (B, T, vocab_size), or None if `loss_only`, and
        the mean cross-entropy in nats, a float32 scalar. Without: logits of the last position,
        (B, 1, vocab_size), and None. Raises ValueError for a context longer than block_size.
        """
        positions = self.positions(idx, cache)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, n_embd)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None)  # (B, T, n_embd)
        x = self.transformer.ln_f(x)
        return logits_and_loss(x, self.lm_head, targets, loss_only)

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """OpenAI's model: gpt2, gpt2-medium, gpt2-large or gpt2-xl. Needs transformers."""
        from transformers import GPT2LMHeadModel

        model = cls(GPTConfig(1024, 50257, *MODEL_SIZES[name], dropout, gelu='tanh'))
        theirs = GPT2LMHeadModel.from_pretrained(name).state_dict()
        for key, weight in model.state_dict().items():
            # OpenAI's linear layers compute x @ W: their weights are (in, out), ours (out, in).
            is_swapped = key.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight'))
            weight.copy_(theirs[key].t() if is_swapped else theirs[key])
        return model


# --- the loss


def next_token_loss(logits, targets, count=None):
    """Mean cross-entropy in nats: -ln of the probability that the model gave to the next token.

    logits: (..., V). targets: (...) int64; -1 is ignored. count: the sum of the losses is divided
    by it; None: by the number of targets that are not -1. Returns a float32 scalar.
    """
    logits = logits.flatten(0, -2).float()  # bf16 has too few digits for a log-sum-exp
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction='sum')
    return total / ((targets != -1).sum().clamp(min=1) if count is None else count)


MAX_LOGITS = 1 << 26  # 256 MB in float32; the loss of more logits is computed in chunks
CHUNK = 1024  # tokens


class LossInChunks(torch.autograd.Function):
    """The sum of the losses of lm_head(x), computed for CHUNK tokens at a time.

    x: (N, n_embd), targets: (N,), params: lm_head's that learn. With GPT-2's vocabulary, all logits
    together are the largest tensor of a training step. So `forward` computes the gradients of a
    chunk together with its loss, then drops its logits; `backward` only scales the gradients.
    """

    @staticmethod
    def forward(ctx, x, targets, lm_head, learns, *params):
        dx, dparams, total = torch.zeros_like(x), [torch.zeros_like(p) for p in params], 0.0
        for start in range(0, len(x), CHUNK):
            chunk = slice(start, start + CHUNK)
            with torch.set_grad_enabled(learns):  # False in an evaluation
                part = x[chunk].detach().requires_grad_()
                loss = next_token_loss(lm_head(part), targets[chunk], count=1)  # their sum
            if learns:
                dx[chunk], *gradients = torch.autograd.grad(loss, (part, *params))
                for sum_of_chunks, gradient in zip(dparams, gradients):
                    sum_of_chunks += gradient
            total += loss.detach()
        ctx.save_for_backward(dx, *dparams)
        return total

    @staticmethod
    def backward(ctx, gradient):
        dx, *dparams = (saved * gradient for saved in ctx.saved_tensors)
        return dx, None, None, None, *dparams


def logits_and_loss(x, lm_head, targets, loss_only):
    """(logits, loss) as `GPT.forward` returns them. x: (B, T, n_embd), the last hidden states."""
    if targets is None:
        return lm_head(x[:, -1:]), None
    # torch.compile saves as much memory by itself, but would compute these chunks all at once.
    if loss_only and not torch.compiler.is_compiling() and (
            targets.numel() * lm_head.out_features > MAX_LOGITS):
        total = LossInChunks.apply(
            x.flatten(0, 1), targets.flatten(), lm_head, torch.is_grad_enabled(),
            *(p for p in lm_head.parameters() if p.requires_grad))
        return None, total / (targets != -1).sum().clamp(min=1)
    logits = lm_head(x)  # (B, T, vocab_size)
    return (None if loss_only else logits), next_token_loss(logits, targets)


# --- sampling


class KVCache:
    """Keys and values of one attention layer: of all tokens read so far, at most `max_tokens`."""

    def __init__(self, max_tokens):
        self.max_tokens, self.kv = max_tokens, None
        self.length = 0  # positions filled

    def append(self, k, v):
        """Add k and v; return all S keys and values so far, each (B, heads, S, head_size)."""
        if self.kv is None:
            B, heads, _, head_size = k.shape
            self.kv = k.new_empty(2, B, heads, self.max_tokens, head_size)
        start, self.length = self.length, self.length + k.size(2)
        self.kv[0, :, :, start : self.length] = k
        self.kv[1, :, :, start : self.length] = v
        return self.kv[:, :, :, : self.length]


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
           vocab_size=None):
    """Yield the next token of each of the B texts in `idx`, (B, 1) int64, one step after another.

    idx: (B, T) int64, T >= 1, of which the last block_size are read. temperature, top_k, top_p:
    see `sample_from`. generator: a torch.Generator on the device of `idx`, for reproducible
    samples. vocab_size: ids from there up are padding of the embedding and are never chosen.
    Raises ValueError as `sample_from` does.

    The prompt is read once, then each step reads one token and finds the earlier ones in the
    cache. Cached keys carry their positions, so a full window can't just slide: its most recent
    half is read again.
    """
    was_training = model.training
    model.eval()
    block_size = model.config.block_size
    window = unread = idx[:, -block_size:]
    max_tokens = min(block_size, window.size(1) + max_new_tokens)
    cache = [KVCache(max_tokens) for _ in model.blocks]
    try:
        for _ in range(max_new_tokens):
            logits, _ = model(unread, cache=cache)
            logits = logits[:, -1, :vocab_size].float()
            unread = sample_from(logits, temperature, top_k, top_p, generator)
            yield unread
            window = torch.cat([window, unread], dim=1)
            if window.size(1) > block_size:
                window = unread = window[:, -max(1, block_size // 2) :]
                cache = [KVCache(max_tokens) for _ in model.blocks]
            elif not any(layer.length for layer in cache):  # a model that does not use it
                unread = window
    finally:
        model.train(was_training)


def sample_from(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Choose one token for each row: logits (B, V) float32 to ids (B, 1) int64.

    temperature: below 1 sharpens the distribution, above 1 flattens it, 0 takes the likeliest
    token. top_k: keep the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833). top_p: keep the
    smallest set of likeliest tokens whose probabilities reach top_p together (nucleus sampling:
    Holtzman et al. 2019, arXiv:1904.09751). Raises ValueError for values outside their range.
    """
    if not (temperature >= 0 and (top_k is None or top_k >= 1)
            and (top_p is None or 0 < top_p <= 1)):
        raise ValueError(f'temperature={temperature} must be at least 0, top_k={top_k} None or at '
                         f'least 1, and top_p={top_p} None or above 0 and at most 1')
    if temperature < 1e-6:  # 0, or so small that the logits would overflow
        return logits.argmax(dim=-1, keepdim=True)
    ids = None  # the token id of each column, once top-k or sorting has reordered them
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        # A token stays if those before it have not reached top_p, so the first always stays.
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)
    return choice if ids is None else ids.gather(-1, choice)


# --- the baseline


@dataclass
class BigramConfig:
    """The shape of a Bigram: a table of vocab_size rows; block_size only shapes the batches."""

    block_size: int = 1024
    vocab_size: int = 50304


class Bigram(LanguageModel):
    """The baseline to beat: a table with a row of logits of the next token for each last token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)  # all next tokens are equally likely: loss ln(vocab_size)

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """As `GPT.forward`, but for any number of tokens; there is nothing to cache."""
        if targets is None:
            return self.table(idx[:, -1:]), None
        logits = self.table(idx)  # (B, T, vocab_size)
        return (None if loss_only else logits), next_token_loss(logits, targets)
