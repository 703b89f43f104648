"""The whole GPT: its sizes, its blocks, its loss, and how it writes.

    model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=16))
    logits, loss = model(idx, targets)             # learn: each position predicts the next token
    idx = model.generate(idx, max_new_tokens=100)  # write: one token after another

`Bigram`, the smallest language model there is, has the same interface: it is what attention has to
beat. Nothing here knows of flags, datasets or training; see train.py for those.

The architecture is GPT-2's: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners". Attention: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762.
"""

import math
import os
import pickle
import warnings
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F

# Sizes by name: (n_layer, n_head, n_embd). The GPT-3 rows are table 2.1 of Brown et al. 2020,
# arXiv:2005.14165, with two mended where the printed numbers do not divide into heads: 1.3B prints
# 24 heads of 128 for a width of 2048 (here 16 heads), 13B a width of 5140 (here 40 x 128 = 5120).
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

MAX_LOGITS = 1 << 26  # 256 MB in float32: where there would be more, the loss goes in chunks


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError, in one sentence, for a shape that cannot be."""

    block_size: int = 1024  # how many tokens the model can look back on
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 ids padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; without is a bit faster
    gelu: str = 'erf'  # 'erf' is the exact GELU; OpenAI's GPT-2 weights want the 'tanh' form
    real_vocab_size: int | None = None  # ids from here on are padding and are never sampled

    def __post_init__(self):
        if self.real_vocab_size is None:
            self.real_vocab_size = 50257 if self.vocab_size == 50304 else self.vocab_size
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'real_vocab_size'):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f'{name} is {value!r}: it must be a whole number from 1 up')
        if self.n_embd % self.n_head:
            nearest = max(self.n_head, round(self.n_embd / self.n_head) * self.n_head)
            raise ValueError(
                f'n_embd={self.n_embd} does not divide into n_head={self.n_head} heads: '
                f'n_embd={nearest} would'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}: it must be at least 0 and below 1')
        if self.gelu not in ('erf', 'tanh'):
            raise ValueError(f"gelu is {self.gelu!r}: it must be 'erf' or 'tanh'")
        if self.real_vocab_size > self.vocab_size:
            raise ValueError(
                f'the tokenizer has {self.real_vocab_size} ids, the model only '
                f'vocab_size={self.vocab_size}: raise vocab_size or change the tokenizer'
            )

    def model_args(self):
        """The seven settings that a checkpoint calls `model_args`."""
        return {k: v for k, v in asdict(self).items() if k not in ('gelu', 'real_vocab_size')}


class LanguageModel(nn.Module):
    """What every model here can do once it has `forward(idx, targets, cache)`: write."""

    # True: given targets, `forward` returns None for the logits, which may save much memory.
    loss_only = False

    def new_cache(self, batch_size):
        """An empty memory for `forward` to fill, or None for a model that needs none."""
        return None

    def num_params(self):
        """Number of weights, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, **kwargs):
        """Append `max_new_tokens` to every row of `idx`: (B, T) int64 to (B, T + max_new_tokens).

        The other arguments are those of `stream`.
        """
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, **kwargs)
        return torch.cat([idx, *tokens], dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yield the next tokens of the B texts in `idx`, a (B, 1) int64 tensor at a time.

        idx: (B, T) int64, T >= 1. temperature, top_k, top_p: see `sample_from`. generator: a
        torch.Generator on the device of `idx`, for samples that can be had again.

        The prompt is read once, then each step reads one token and finds the earlier ones in the
        cache. Positions are learned, so a full window can't just slide: its most recent half is
        read anew, which costs one pass over block_size / 2 tokens every block_size / 2 steps or
        so. Of a prompt longer than block_size, the end is kept.
        """
        if max_new_tokens < 0:
            raise ValueError(f'max_new_tokens is {max_new_tokens}: it cannot be negative')
        was_training = self.training
        self.eval()
        block_size = self.config.block_size
        window = unread = idx[:, -block_size:]
        cache = self.new_cache(len(idx))
        try:
            for _ in range(max_new_tokens):
                logits, _ = self(unread, cache=cache)
                logits = logits[:, -1, : self.config.real_vocab_size].float()
                unread = sample_from(logits, temperature, top_k, top_p, generator)
                yield unread
                if window.size(1) == block_size:
                    window = window[:, block_size - block_size // 2 + 1 :]
                    window = unread = torch.cat([window, unread], dim=1)
                    cache = self.new_cache(len(idx))
                else:
                    window = torch.cat([window, unread], dim=1)
        finally:
            self.train(was_training)


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
    if temperature == 0:
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


class Bigram(LanguageModel):
    """The next token given the last one alone: a table of logits, trained like any other model.

    Its loss is bounded by the entropy of letter pairs; whatever a GPT does better, it learnt from
    looking further back.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.table.weight)  # every next token is equally likely: loss ln V

    def forward(self, idx, targets=None, cache=None):
        """As `GPT.forward`; there is nothing to cache."""
        if targets is None:
            return self.table(idx[:, [-1]]), None
        logits = self.table(idx)
        loss = next_token_loss(logits[..., : self.config.real_vocab_size], targets)
        return None if self.loss_only else logits, loss

    def flops_per_token(self):
        """The table is looked up, not multiplied."""
        return 0


def next_token_loss(logits, targets):
    """Mean cross-entropy in nats: logits (B, T, V), targets (B, T) int64, -1 where none counts."""
    logits = logits.float()  # bf16 has too few digits for a log-sum-exp
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class ChunkedLoss(torch.autograd.Function):
    """`next_token_loss` of the logits x @ weight^T, taken for `size` tokens at a time.

    x: (N, C), weight: (V, C), targets: (N,) int64, -1 where none counts; returns a float32 scalar.
    learning: whether a backward pass will follow, which can't be asked inside: there, gradients
    are always off.

    Where V is large, the logits of all tokens are the largest tensor of a training step. Here the
    gradients of a chunk are computed together with its loss, and its logits are dropped: on a CPU
    0.4 of the memory for GPT-2's head, at 0.9 of the speed. (F.linear_cross_entropy of torch 2.13
    takes five times as long there.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, learning, size=1024):
        ctx.dtypes = x.dtype, weight.dtype
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        if learning:
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        counted = targets != -1
        for i in range(0, len(x), size):
            some = slice(i, i + size)
            logits = (x[some] @ weight.T).float()
            total += F.cross_entropy(logits, targets[some], ignore_index=-1, reduction='sum')
            if not learning:
                continue
            # The gradient by a logit is its probability, less 1 if it is the target's.
            error = F.softmax(logits, dim=-1)
            places = targets[some].clamp(min=0)[:, None]
            error = error.scatter_add(1, places, -torch.ones_like(error[:, :1]))
            error = (error * counted[some, None]).to(dtype)
            dx[some] = error @ weight
            dweight += error.T @ x[some]
        count = counted.sum()
        if learning:
            ctx.save_for_backward(dx, dweight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        *sums, count = ctx.saved_tensors
        means = [(d.float() * (grad / count)).to(dtype) for d, dtype in zip(sums, ctx.dtypes)]
        return *means, None, None, None


class KVCache:
    """What one attention layer remembers: the keys and values of the tokens read so far.

    kv: (2, B, n_head, room, head_size), of which `length` positions are filled. like: a weight of
    the model, for its device and dtype.

    On a CPU, few texts are written fastest with a cache in float32: attention for a single query
    takes a quarter of bf16's time. With many, the bytes to read are what counts, so there it is
    bf16; and as a product would first copy a slice, it is read with all its room, which grows by
    64 positions at a time. That makes a small model 16 % faster for 16 texts, 24 % for 32.
    """

    def __init__(self, batch_size, config, like):
        on_cpu = like.device.type == 'cpu'
        dtype = torch.float32 if on_cpu and batch_size < 8 else like.dtype
        self.whole = on_cpu and dtype == torch.bfloat16
        self.growth = 64 if self.whole else config.block_size
        shape = (2, batch_size, config.n_head, 0, config.n_embd // config.n_head)
        self.kv = torch.empty(shape, dtype=dtype, device=like.device)
        self.length = 0

    def append(self, k, v):
        """Add k and v, (B, n_head, T, head_size) each; return all keys and values so far.

        Returns two tensors (B, n_head, S, head_size), where S may be more than `length`: beyond it
        are zeros, to be masked.
        """
        start, self.length = self.length, self.length + k.size(2)
        lack = self.length - self.kv.size(3)
        if lack > 0:
            self.kv = F.pad(self.kv, (0, 0, 0, math.ceil(lack / self.growth) * self.growth))
        self.kv[0, :, :, start : self.length] = k
        self.kv[1, :, :, start : self.length] = v
        if start == 0:
            return k, v  # the first tokens have but themselves
        return self.kv[:, :, :, : None if self.whole else self.length].unbind(0)


def attend(q, k, v, start=0, dropout=0.0):
    """Causal attention, spelled out: softmax(q k^T / sqrt(head_size) + mask) v.

    q: (B, n_head, T, head_size); k, v: (B, n_head, S, head_size). The first query stands at
    position `start` (above 0 when there is a cache). Returns the shape of q. Each query scores all
    keys; the mask bars those after its own position; softmax turns the scores into weights; the
    result is the weighted mean of the values (Vaswani et al. 2017, section 3.2.1).
    """
    T, S = q.size(2), k.size(2)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, n_head, T, S)
    if start + 1 < S:  # else there is one query, the latest, and it may see every key
        mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device)
        scores += mask.triu(diagonal=start + 1)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return weights @ v


class Attention(nn.Module):
    """Tokens look at earlier tokens and take from them what they need."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape  # batch, time, channels
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, n_head, T, head_size)
        start = cache.length if cache else 0
        if cache:
            k, v = cache.append(k, v)
            q = q.to(k.dtype)
        dropout = self.dropout if self.training else 0.0
        S = k.size(2)
        if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and (T == 1 or S <= 512):
            y = attend(q, k, v, start, dropout)  # here 2 x the speed of the fused one at T=256
        elif T in (1, S):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        else:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(start)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y.to(x.dtype)))


class MLP(nn.Module):
    """Each token thinks by itself: four times wider, a bend, and back."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Communicate, then compute; each adds to the residual stream what it found.

    The norm comes first ("pre-norm"), so the stream itself is never squeezed: Xiong et al. 2020,
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

    def init_weights(self):
        """GPT-2's start: N(0, 0.02) matrices, zero biases, LayerNorms that do nothing yet.

        Each block adds twice to the residual stream, so the 2 n_layer projections that do start
        smaller by sqrt(2 n_layer), and the stream's variance doesn't grow with depth.
        """
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def new_cache(self, batch_size):
        """One empty KVCache a layer."""
        like = self.transformer.wpe.weight
        return [KVCache(batch_size, self.config, like) for _ in self.transformer.h]

    def forward(self, idx, targets=None, cache=None):
        """Predict the token after each of `idx`.

        idx: (B, T) int64 ids. targets: (B, T) int64, the ids that did come next, -1 where none
        counts. cache: from `new_cache`; `idx` then holds only the tokens not read before.

        Returns (logits, loss). With targets: logits (B, T, vocab_size) and the mean cross-entropy
        in nats, a float32 scalar; None and the loss if `loss_only`. Without: the last position's
        logits, (B, 1, vocab_size), and None. Raises ValueError if the context would be longer than
        block_size.
        """
        T = idx.size(1)
        start = cache[0].length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(
                f'{start + T} tokens do not fit the context of '
                f'block_size={self.config.block_size}: pass the last ones only'
            )
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        real = self.config.real_vocab_size
        if self.loss_only and targets.numel() * real > MAX_LOGITS:
            return None, ChunkedLoss.apply(
                x.flatten(0, 1), self.lm_head.weight[:real], targets.flatten(),
                torch.is_grad_enabled(),
            )
        logits = self.lm_head(x)
        loss = next_token_loss(logits[..., :real], targets)
        return None if self.loss_only else logits, loss

    def flops_per_token(self):
        """Floating-point operations to train on one token: forward and backward.

        6 for each weight that multiplies and 12 n_layer n_embd T for attention: Chowdhery et al.
        2022 (PaLM), arXiv:2204.02311, appendix B. Position embeddings are only looked up.
        """
        c = self.config
        weights = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size):
        """Shorten the context, say to fine-tune a long model on little memory."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f'block_size={block_size} is not within the {self.config.block_size} positions '
                'that the model has learnt'
            )
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight.detach()[:block_size].clone(), freeze=False
        )

    @classmethod
    def from_pretrained(cls, name, dropout=0.0, vocab_size=None):
        """GPT-2's weights from Hugging Face: 'gpt2' ... 'gpt2-xl', or a local folder of that form.

        vocab_size: pad the vocabulary to so many rows; the padding takes no part in the loss.
        Raises ImportError without the package transformers, ValueError for another architecture,
        OSError when the weights can't be had.
        """
        from transformers import AutoConfig, GPT2LMHeadModel

        gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'erf'}
        try:
            c = AutoConfig.from_pretrained(name)
            plain = c.model_type == 'gpt2' and c.activation_function in gelu
            plain = plain and c.n_inner in (None, 4 * c.n_embd) and c.tie_word_embeddings
            if not plain or c.scale_attn_by_inverse_layer_idx or not c.scale_attn_weights:
                raise ValueError(f'{name} is not a plain GPT-2, and only those can be loaded')
            theirs = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32).state_dict()
        except OSError as error:
            raise OSError(
                f'cannot get the weights of {name!r} ({str(error).splitlines()[0][:100]}): '
                'connect once, or download config.json and model.safetensors from the '
                "model's page on Hugging Face into a folder and give that folder instead"
            ) from None
        model = cls(GPTConfig(
            block_size=c.n_positions, vocab_size=vocab_size or c.vocab_size, n_layer=c.n_layer,
            n_head=c.n_head, n_embd=c.n_embd, dropout=dropout, bias=True,
            gelu=gelu[c.activation_function], real_vocab_size=c.vocab_size,
        ))
        weights = model.state_dict()
        for key, ours in weights.items():
            weight = theirs[key].t() if is_conv1d(key) else theirs[key]
            ours[: len(weight)] = weight
        return model

    def save_pretrained(self, folder, tokenizer=None):
        """Write a Hugging Face folder that AutoModelForCausalLM and AutoTokenizer load.

        Padding of the vocabulary is left out; biases that this model doesn't have are zeros there.
        Raises ImportError without the package transformers.
        """
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        c = self.config
        eot = getattr(tokenizer, 'eot', None)
        theirs = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.real_vocab_size, n_positions=c.block_size, n_layer=c.n_layer,
            n_head=c.n_head, n_embd=c.n_embd, bos_token_id=eot, eos_token_id=eot,
            activation_function='gelu_new' if c.gelu == 'tanh' else 'gelu',
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        ))
        ours = self.state_dict()
        for key, weight in theirs.state_dict().items():
            if key not in ours:
                weight.zero_()
            else:
                weight.copy_(ours[key].t() if is_conv1d(key) else ours[key][: len(weight)])
        theirs.save_pretrained(folder)
        if tokenizer:
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.fast(), model_max_length=c.block_size,
                clean_up_tokenization_spaces=False,
                **({'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'} if eot else {}),
            ).save_pretrained(folder)


def is_conv1d(key):
    """Whether Hugging Face keeps this weight transposed, as (in, out)."""
    return key.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight'))


def is_pretrained(name):
    """Whether `GPT.from_pretrained` takes `name`: gpt2 ... gpt2-xl, or a Hugging Face folder."""
    by_name = name in MODEL_SIZES and name.startswith('gpt2') and not os.path.exists(name)
    return by_name or os.path.exists(os.path.join(name, 'config.json'))


def checkpoint_file(path):
    """The file to read for `path`: itself, or in a folder best.pt and else ckpt.pt."""
    if not os.path.isdir(path):
        return path
    for name in ('best.pt', 'ckpt.pt'):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise FileNotFoundError(f'no best.pt or ckpt.pt in the folder {path}: train into it first')


def load_checkpoint(path, device='cpu'):
    """Read a checkpoint, ours or nanoGPT's, as a dict of tensors and plain types.

    Only those are ever unpickled, so a stranger's file cannot run code. Raises FileNotFoundError
    or ValueError with a sentence for a file that is missing, damaged or something else.
    """
    path = checkpoint_file(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f'no checkpoint {path}: train one first, or mend the path')
    if os.path.getsize(path) == 0:
        raise ValueError(f'{path} is empty: the copy failed, or something else made it')
    try:
        with warnings.catch_warnings():  # about pickles that it will refuse anyway
            warnings.simplefilter('ignore')
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f'{path} was not loaded: it is no checkpoint, or holds more than tensors and plain '
            'values and might run code; give the .pt file that train.py wrote'
        ) from None
    except (RuntimeError, OSError, EOFError, LookupError, AttributeError, TypeError) as error:
        reason = str(error).split('\n')[0][:100]
        raise ValueError(f'{path} is damaged or cut off ({reason}): take an older copy') from None
    for key in ('model', 'model_args'):
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict):
            raise ValueError(f'{path} is no checkpoint of a GPT: it has no {key!r}; give the '
                             '.pt file that train.py wrote')
    # Compiled models used to be saved under their wrapper's name.
    weights = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
    # Attention masks were once saved as well: (1, 1, T, T) tensors.
    checkpoint['model'] = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}
    return checkpoint


def build_model(checkpoint, **changes):
    """The model of a `load_checkpoint` dict, with its weights; `changes` override the config."""
    config = checkpoint.get('config', {})
    tokenizer = checkpoint.get('tokenizer') or {}
    extra = {'gelu': config.get('gelu', 'erf'), 'real_vocab_size': tokenizer.get('vocab_size')}
    cls = Bigram if config.get('model') == 'bigram' else GPT
    try:
        model = cls(GPTConfig(**{**checkpoint['model_args'], **extra, **changes}))
        model.load_state_dict(checkpoint['model'])
    except (RuntimeError, TypeError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(
            f'the weights do not fit the model that comes with them: {reason}'
        ) from None
    return model
