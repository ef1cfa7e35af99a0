//! The operations that models are made of. Each is a meaning over packed
//! weights with everything fused in that its kernel can take in.
//!
//! Shapes are checked here, once; a mismatch is a defect of the model's code
//! (checkpoints are checked at load), so it panics with both shapes.

use half::bf16;
use hypergen_cpu::{self as kernels, Activation, AttentionShape, ConvShape, GroupBias, GroupNormShape};

use crate::packed::{Conv, GegluProjection, Linear, MatrixOf, Norm, present};
use crate::tensor::{DType, Shape, Stored, Tensor};

/// An element type that every operation exists for.
trait Number: Stored + MatrixOf {}
impl Number for f32 {}
impl Number for bf16 {}

/// Calls a generic function for the type of a tensor.
macro_rules! by_type {
    ($tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $tensor.dtype() {
            DType::F32 => $function::<f32>($($argument),*),
            DType::Bf16 => $function::<bf16>($($argument),*),
        }
    };
}

/// What is done to a product before it is stored, in this order: bias,
/// `add_per_picture`, activation, `residual`, `scale`.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// `[n, c]`: added to every pixel or token of its picture.
    pub add_per_picture: Option<&'a Tensor>,
    /// Applied after the biases.
    pub activation: Activation,
    /// Of the output's shape.
    pub residual: Option<&'a Tensor>,
    /// Multiplies the result.
    pub scale: f32,
}

impl Default for Epilogue<'_> {
    fn default() -> Self {
        Self { add_per_picture: None, activation: Activation::None, residual: None, scale: 1.0 }
    }
}

impl<'a> Epilogue<'a> {
    /// Only an activation.
    pub fn activation(activation: Activation) -> Self {
        Self { activation, ..Self::default() }
    }

    /// Only a residual.
    pub fn residual(residual: &'a Tensor) -> Self {
        Self { residual: Some(residual), ..Self::default() }
    }

    fn lower<T: Number>(&self, bias: Option<&'a [f32]>, out: Shape) -> kernels::Epilogue<'a, T> {
        if let Some(r) = self.residual {
            assert_eq!(r.shape().elements(), out.elements(), "residual {:?} of output {out:?}", r.shape());
        }
        kernels::Epilogue {
            bias,
            group_bias: self.add_per_picture.map(|t| {
                let groups = t.shape().elements() / out.last();
                assert_eq!(t.shape().last(), out.last(), "{:?} added to every pixel of {out:?}", t.shape());
                GroupBias { values: t.slice(), rows_per_group: out.elements() / out.last() / groups }
            }),
            activation: self.activation,
            residual: self.residual.map(Tensor::slice),
            scale: self.scale,
        }
    }
}

/// `x[.., k]` times a linear layer: `[.., n]`.
pub fn linear(x: &Tensor, layer: &Linear, epilogue: Epilogue<'_>) -> Tensor {
    fn typed<T: Number>(x: &Tensor, layer: &Linear, epilogue: &Epilogue<'_>) -> Tensor {
        let shape = x.shape().with_last(layer.matrix.n());
        let bias = present(layer.bias.as_ref());
        let lowered = epilogue.lower::<T>(bias.as_deref().map(Vec::as_slice), shape);
        Tensor::build::<T>(x.device(), shape, |out| {
            kernels::linear(
                x.device().cpu_kernels(),
                x.slice(),
                T::matrix(&layer.matrix.get()),
                &lowered,
                out,
            );
        })
    }
    assert_eq!(
        x.shape().last(),
        layer.matrix.k(),
        "linear layer of {} inputs given {:?}",
        layer.matrix.k(),
        x.shape()
    );
    let (k, n) = (layer.matrix.k(), layer.matrix.n());
    let rows = x.shape().elements() / k.max(1);
    let _span = x.device().span("linear", &[rows, k, n], &[rows, k, n]);
    by_type!(x, typed(x, layer, &epilogue))
}

/// The gated projection of a feed-forward layer: `x[.., k]` to `[.., h]`,
/// `value * gelu(gate)`.
pub fn geglu(x: &Tensor, layer: &GegluProjection) -> Tensor {
    fn typed<T: Number>(x: &Tensor, layer: &GegluProjection) -> Tensor {
        let shape = x.shape().with_last(layer.matrix.n() / 2);
        Tensor::build::<T>(x.device(), shape, |out| {
            let bias = present(layer.bias.as_ref());
            let bias = bias.as_deref().map(Vec::as_slice);
            kernels::geglu(x.device().cpu_kernels(), x.slice(), T::matrix(&layer.matrix.get()), bias, out);
        })
    }
    assert_eq!(
        x.shape().last(),
        layer.matrix.k(),
        "projection of {} inputs given {:?}",
        layer.matrix.k(),
        x.shape()
    );
    let (k, n) = (layer.matrix.k(), layer.matrix.n());
    let rows = x.shape().elements() / k.max(1);
    let _span = x.device().span("geglu", &[rows, k, n], &[rows, k, n]);
    by_type!(x, typed(x, layer))
}

/// How a convolution's window moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Output as large as the input (odd kernels, padded with zeros).
    Same,
    /// Every second pixel, padded with one zero on all sides.
    Halve,
    /// Every second pixel, padded only at the right and below.
    HalvePadAfter,
    /// As `Same`, on the input enlarged to this height and width by nearest neighbours.
    Enlarge(usize, usize),
}

/// Convolution of a picture `[n, h, w, c]`.
pub fn conv2d(x: &Tensor, layer: &Conv, window: Window, epilogue: Epilogue<'_>) -> Tensor {
    fn typed<T: Number>(x: &Tensor, layer: &Conv, shape: &ConvShape, epilogue: &Epilogue<'_>) -> Tensor {
        let out_shape = Shape::from([shape.batch, shape.out_h, shape.out_w, layer.matrix.n()]);
        let bias = present(layer.bias.as_ref());
        let lowered = epilogue.lower::<T>(bias.as_deref().map(Vec::as_slice), out_shape);
        Tensor::build::<T>(x.device(), out_shape, |out| {
            kernels::conv2d(
                x.device().cpu_kernels(),
                x.slice(),
                shape,
                T::matrix(&layer.matrix.get()),
                &lowered,
                out,
            );
        })
    }
    let shape = conv_shape(x, layer, window);
    let ConvShape { batch, out_h, out_w, in_c, .. } = shape;
    let (k, n) = (layer.matrix.k(), layer.matrix.n());
    let sizes = [batch, out_h, out_w, layer.kernel, shape.stride, in_c, n];
    let _span = x.device().span("conv2d", &sizes, &[batch, out_h, out_w, k, n]);
    by_type!(x, typed(x, layer, &shape, &epilogue))
}

fn conv_shape(x: &Tensor, layer: &Conv, window: Window) -> ConvShape {
    let [batch, in_h, in_w, in_c] = x.nhwc();
    let k = layer.kernel;
    assert_eq!(
        k * k * in_c,
        layer.matrix.k(),
        "convolution of {} inputs given {:?}",
        layer.matrix.k() / (k * k),
        x.shape()
    );
    let pad = k / 2;
    let same = ConvShape {
        batch,
        in_h,
        in_w,
        in_c,
        up_h: in_h,
        up_w: in_w,
        kernel_h: k,
        kernel_w: k,
        stride: 1,
        pad_top: pad,
        pad_left: pad,
        out_h: in_h,
        out_w: in_w,
    };
    match window {
        Window::Same => same,
        Window::Halve => ConvShape { stride: 2, out_h: in_h.div_ceil(2), out_w: in_w.div_ceil(2), ..same },
        Window::HalvePadAfter => {
            ConvShape { stride: 2, pad_top: 0, pad_left: 0, out_h: in_h / 2, out_w: in_w / 2, ..same }
        }
        Window::Enlarge(h, w) => ConvShape { up_h: h, up_w: w, out_h: h, out_w: w, ..same },
    }
}

/// Group normalisation of `[n, h, w, c]` or `[n, tokens, c]`, with an activation after it.
pub fn group_norm(x: &Tensor, norm: &Norm, groups: usize, activation: Activation) -> Tensor {
    fn typed<T: Number>(x: &Tensor, norm: &Norm, shape: &GroupNormShape, activation: Activation) -> Tensor {
        Tensor::build::<T>(x.device(), x.shape(), |out| {
            let cpu = x.device().cpu_kernels();
            kernels::group_norm(cpu, x.slice(), shape, &norm.gamma.get(), &norm.beta.get(), activation, out);
        })
    }
    let (batch, channels) = (x.dims()[0], x.shape().last());
    let pixels = x.shape().elements() / (batch * channels).max(1);
    let shape = GroupNormShape { batch, pixels, channels, groups, eps: norm.eps };
    let _span = x.device().span("group_norm", &[batch, pixels, channels], &[]);
    by_type!(x, typed(x, norm, &shape, activation))
}

/// Layer normalisation over the innermost dimension.
pub fn layer_norm(x: &Tensor, norm: &Norm) -> Tensor {
    fn typed<T: Number>(x: &Tensor, norm: &Norm) -> Tensor {
        Tensor::build::<T>(x.device(), x.shape(), |out| {
            let cpu = x.device().cpu_kernels();
            let (gamma, beta) = (norm.gamma.get(), norm.beta.get());
            kernels::layer_norm(cpu, x.slice(), x.shape().last(), norm.eps, &gamma, &beta, out);
        })
    }
    let channels = x.shape().last();
    let _span = x.device().span("layer_norm", &[x.shape().elements() / channels.max(1), channels], &[]);
    by_type!(x, typed(x, norm))
}

/// Columns of a tensor `[n, tokens, columns]` that hold the queries, keys or
/// values of all heads; several may lie side by side in one projection.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    /// The projection.
    pub tensor: &'a Tensor,
    /// Column at which the first head begins.
    pub offset: usize,
}

impl<'a> From<&'a Tensor> for Columns<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self { tensor, offset: 0 }
    }
}

impl Columns<'_> {
    fn lower<T: Number>(&self) -> kernels::Heads<'_, T> {
        kernels::Heads {
            data: self.tensor.slice(),
            row_stride: self.tensor.shape().last(),
            offset: self.offset,
        }
    }

    fn rows(&self) -> usize {
        self.tensor.dims()[0]
    }

    fn tokens(&self) -> usize {
        self.tensor.dims()[1]
    }
}

/// Multi-head attention with scores scaled by `1 / sqrt(head_dim)`:
/// `[n, tokens, heads * head_dim]`.
pub fn attention(
    q: Columns<'_>,
    k: Columns<'_>,
    v: Columns<'_>,
    heads: usize,
    head_dim: usize,
    causal: bool,
) -> Tensor {
    attention_to(q, std::iter::once((k, v)), heads, head_dim, causal)
}

/// Attention of a batch whose rows have keys and values of their own length: the
/// first pair of `keys_values` is for as many rows of `q` as it has itself, the
/// second for the rows after them, and so on.
///
/// # Panics
/// When the pairs have more or fewer rows than `q`.
pub fn cross_attention<'a>(
    q: Columns<'_>,
    keys_values: impl Iterator<Item = (Columns<'a>, Columns<'a>)> + Clone,
    heads: usize,
    head_dim: usize,
) -> Tensor {
    attention_to(q, keys_values, heads, head_dim, false)
}

fn attention_to<'a>(
    q: Columns<'_>,
    keys_values: impl Iterator<Item = (Columns<'a>, Columns<'a>)> + Clone,
    heads: usize,
    head_dim: usize,
    causal: bool,
) -> Tensor {
    fn typed<'a, T: Number>(
        q: Columns<'_>,
        keys_values: impl Iterator<Item = (Columns<'a>, Columns<'a>)>,
        shape: AttentionShape,
    ) -> Tensor {
        let device = q.tensor.device();
        let whole = Shape::from([shape.batch, shape.q_len, shape.heads * shape.head_dim]);
        Tensor::build::<T>(device, whole, |mut out| {
            let mut queries = q.lower();
            for (k, v) in keys_values {
                let shape = AttentionShape { batch: k.rows(), kv_len: k.tokens(), ..shape };
                let tokens = shape.batch * shape.q_len;
                let (part, rest) = out.split_at_mut(tokens * shape.heads * shape.head_dim);
                let (own, others) = queries.data.split_at(tokens * queries.row_stride);
                let own = kernels::Heads { data: own, ..queries };
                kernels::attention(device.cpu_kernels(), &shape, own, k.lower(), v.lower(), part);
                (out, queries.data) = (rest, others);
            }
        })
    }
    let shape = AttentionShape {
        batch: q.rows(),
        heads,
        head_dim,
        q_len: q.tokens(),
        kv_len: 0,
        scale: 1.0 / (head_dim as f32).sqrt(),
        causal,
    };
    let rows: usize = keys_values.clone().map(|(k, _)| k.rows()).sum();
    assert_eq!(rows, q.rows(), "keys and values of {rows} rows for the queries {:?}", q.tensor.shape());
    // All keys of all rows: what the work is proportional to.
    let keys = keys_values.clone().map(|(k, _)| k.rows() * k.tokens()).sum();
    let AttentionShape { batch, q_len, .. } = shape;
    let sizes = [batch, heads, head_dim, q_len, keys / batch.max(1)];
    let _span = q.tensor.device().span("attention", &sizes, &[2, heads, head_dim, q_len, keys]);
    by_type!(q.tensor, typed(q, keys_values, shape))
}

/// Sum of two tensors of one shape.
pub fn add(a: &Tensor, b: &Tensor) -> Tensor {
    fn typed<T: Number>(a: &Tensor, b: &Tensor) -> Tensor {
        Tensor::build::<T>(a.device(), a.shape(), |out| {
            kernels::add(a.device().cpu_kernels(), a.slice(), b.slice(), out);
        })
    }
    assert_eq!(a.shape(), b.shape());
    let _span = a.device().span("add", a.dims(), &[]);
    by_type!(a, typed(a, b))
}

/// An activation alone.
pub fn activate(x: &Tensor, activation: Activation) -> Tensor {
    fn typed<T: Number>(x: &Tensor, activation: Activation) -> Tensor {
        Tensor::build::<T>(x.device(), x.shape(), |out| {
            kernels::activate(x.device().cpu_kernels(), x.slice(), activation, out);
        })
    }
    let _span = x.device().span("activate", x.dims(), &[]);
    by_type!(x, typed(x, activation))
}

/// Joins two tensors along their innermost dimension.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Tensor {
    fn typed<T: Number>(a: &Tensor, b: &Tensor) -> Tensor {
        let (ca, cb) = (a.shape().last(), b.shape().last());
        Tensor::build::<T>(a.device(), a.shape().with_last(ca + cb), |out| {
            kernels::concat_columns(a.device().cpu_kernels(), a.slice(), ca, b.slice(), cb, out);
        })
    }
    let rows = |t: &Tensor| t.shape().elements() / t.shape().last().max(1);
    assert_eq!(rows(a), rows(b), "{:?} beside {:?}", a.shape(), b.shape());
    let _span = a.device().span("concat", &[rows(a), a.shape().last(), b.shape().last()], &[]);
    by_type!(a, typed(a, b))
}

/// Rows of a table `[rows, c]` by index, each plus its position's row of
/// `positions[tokens, c]`: `[n, tokens, c]`. The rows of `more`, if given,
/// follow those of the table.
///
/// # Panics
/// When an index lies outside of both; tokenizers are checked at load.
pub fn embed(
    table: &Tensor,
    more: Option<&Tensor>,
    positions: &Tensor,
    ids: &[u32],
    tokens: usize,
) -> Tensor {
    fn typed<T: Number>(
        table: &Tensor,
        more: Option<&Tensor>,
        positions: &Tensor,
        ids: &[u32],
        tokens: usize,
    ) -> Tensor {
        let c = table.shape().last();
        Tensor::build::<T>(table.device(), Shape::from([ids.len() / tokens, tokens, c]), |out| {
            let (table, positions) = (table.slice::<T>(), positions.slice::<T>());
            let more = more.map_or(&[][..], Tensor::slice::<T>);
            for (i, (out, &id)) in out.chunks_exact_mut(c).zip(ids).enumerate() {
                let start = id as usize * c;
                let row = table.get(start..).filter(|rest| rest.len() >= c);
                let row = row.unwrap_or_else(|| &more[start - table.len()..]);
                let position = &positions[i % tokens * c..][..c];
                for ((out, a), b) in out.iter_mut().zip(&row[..c]).zip(position) {
                    *out = T::from_f32(a.to_f32() + b.to_f32());
                }
            }
        })
    }
    by_type!(table, typed(table, more, positions, ids, tokens))
}
