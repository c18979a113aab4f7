//! Frozen weights on the card: dense in the compute precision, or four bits wide and expanded for each product.

use super::compile::Source;
use super::driver::{Arg, Cuda, DeviceMemory};
use super::gemm::{Kind, Places};
use crate::device::Buffer;
use crate::frozen::{FourBit, FourBitScales, Precision, RowSource};
use crate::ops::Product;
use crate::tensor::Tensor;

/// A frozen matrix [out, in], row-major.
pub(crate) struct Matrix {
    form: Form,
    precision: Precision,
    shape: (usize, usize),
    bytes: usize,
}

enum Form {
    Dense(DeviceMemory),
    FourBit(Expandable),
}

/// What `expand_four_bit` reads.
struct Expandable {
    codes: DeviceMemory,
    levels: DeviceMemory,
    scales: DeviceMemory,
    double: Option<(DeviceMemory, DeviceMemory)>,
    offset: f32,
    block: usize,
}

/// Elements that are read from a source and copied at a time.
const AT_ONCE: usize = 1 << 22;

impl Matrix {
    /// The rows of `source` in `precision`.
    pub(crate) fn dense(card: &Cuda, source: &dyn RowSource, precision: Precision) -> Matrix {
        let (out, inn) = source.shape();
        let bytes = out * inn * element_bytes(precision);
        let memory = card.take(bytes);
        let step = (AT_ONCE / inn.max(1)).max(1);
        let mut rows = vec![0.0f32; step.min(out) * inn];
        let mut rounded = Vec::new();
        for start in (0..out).step_by(step) {
            let end = (start + step).min(out);
            let rows = &mut rows[..(end - start) * inn];
            source.rows(start..end, rows);
            let at = start * inn * element_bytes(precision);
            match precision {
                Precision::F32 => card.write(rows, &memory, at),
                Precision::Bf16 => {
                    rounded.clear();
                    rounded.extend(rows.iter().map(|&v| half::bf16::from_f32(v).to_bits()));
                    card.write(&rounded, &memory, at);
                }
            }
        }
        Matrix { form: Form::Dense(memory), precision, shape: (out, inn), bytes }
    }

    /// A matrix that stays four bits wide.
    pub(crate) fn four_bit(
        card: &Cuda,
        shape: (usize, usize),
        w: &FourBit<'_>,
        precision: Precision,
    ) -> Matrix {
        let (scales, double, offset) = match w.scales {
            FourBitScales::Plain(scales) => (scales, None, 0.0),
            FourBitScales::Double { codes, scales, offset, map } => {
                (scales, Some((card.upload(codes), card.upload(map))), offset)
            }
        };
        let bytes =
            w.codes.len() + 4 * scales.len() + double.as_ref().map_or(0, |(c, m)| c.bytes() + m.bytes());
        let form = Expandable {
            codes: card.upload(w.codes),
            levels: card.upload(w.levels),
            scales: card.upload(scales),
            double,
            offset,
            block: w.block,
        };
        Matrix { form: Form::FourBit(form), precision, shape, bytes }
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes on the card.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The matrix in f32 [out, in].
    pub(crate) fn to_f32(&self, card: &Cuda) -> Buffer {
        let n = self.shape.0 * self.shape.1;
        let y = Buffer::f32(n);
        match &self.form {
            Form::FourBit(w) => expand(card, w, n, Arg::NULL, y.arg()),
            Form::Dense(memory) if self.precision == Precision::F32 => {
                card.copy(memory.arg().address(), y.arg().address(), 4 * n);
            }
            Form::Dense(memory) => card.widen(memory.arg(), y.arg(), n),
        }
        if self.precision == Precision::Bf16 && matches!(self.form, Form::FourBit(_)) {
            // What is multiplied by is rounded.
            return rounded(card, &y);
        }
        y
    }
}

fn element_bytes(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
    }
}

fn expand(card: &Cuda, w: &Expandable, n: usize, bf16: Arg, f32: Arg) {
    let (codes, map) = match &w.double {
        Some((codes, map)) => (codes.arg(), map.arg()),
        None => (Arg::NULL, Arg::NULL),
    };
    let args = [
        w.codes.arg(),
        w.levels.arg(),
        w.scales.arg(),
        codes,
        map,
        Arg::F32(w.offset),
        Arg::I64(w.block as i64),
        Arg::I64(n as i64),
        bf16,
        f32,
    ];
    card.launch_over(Source::Frozen, "expand_four_bit", n.div_ceil(2), &args);
}

/// x in bf16 and back.
fn rounded(card: &Cuda, x: &Buffer) -> Buffer {
    let n = x.len();
    let short = card.to_bf16(x.arg(), n);
    let y = Buffer::f32(n);
    card.widen(short.arg(), y.arg(), n);
    y
}

impl Cuda {
    /// `n` floats in bf16.
    pub(crate) fn to_bf16(&self, x: Arg, n: usize) -> DeviceMemory {
        let y = self.take(2 * n);
        let args = [x, y.arg(), Arg::I64(n as i64)];
        if x.address().is_multiple_of(16) {
            self.launch_over(Source::Frozen, "to_bf16_of", n.div_ceil(4), &args);
        } else {
            self.launch_over(Source::Frozen, "to_bf16_unaligned", n, &args);
        }
        y
    }

    /// `n` numbers of bf16 in f32.
    pub(crate) fn widen(&self, x: Arg, y: Arg, n: usize) {
        self.launch_over(Source::Frozen, "from_bf16_of", n, &[x, y, Arg::I64(n as i64)]);
    }

    /// A product of two tensors, none of them empty.
    pub(super) fn product(&self, p: Product, a: &Tensor, b: &Tensor, y: &Buffer) {
        let y = y.arg().address();
        let at = |a: Arg, b: Arg| Places { a: a.address(), b: b.address(), bias: 0, y };
        let bf16 = self.bf16_allowed();
        if bf16 && p.rounds && self.multiply(Kind::Bf16, p, at(a.bf16(self), b.bf16(self))) {
            return;
        }
        let kind = if bf16 { Kind::Tf32 } else { Kind::F32 };
        let _ = self.multiply(kind, p, at(a.arg(), b.arg()));
    }

    /// What the model computes in.
    pub(super) fn precision(&self) -> Precision {
        if self.bf16_allowed() { Precision::Bf16 } else { Precision::F32 }
    }

    /// y[i] = row ids[i] of a dense table.
    pub(super) fn look_up(&self, table: &Matrix, ids: &Tensor, y: &mut Buffer) {
        let Form::Dense(memory) = &table.form else { unreachable!("tables are not quantized") };
        let kernel = match table.precision {
            Precision::F32 => "gather_f32",
            Precision::Bf16 => "gather_bf16",
        };
        let n = ids.len() * table.shape.1;
        let (width, count) = (Arg::I64(table.shape.1 as i64), Arg::I64(n as i64));
        self.launch_over(Source::Frozen, kernel, n, &[memory.arg(), ids.arg(), width, count, y.arg()]);
    }

    /// y = x·Wᵀ + bias.
    pub(super) fn frozen_product(&self, w: &Matrix, x: &Tensor, bias: Option<&Tensor>, y: &mut Buffer) {
        let (out, inn) = w.shape;
        let p = Product { transpose_b: true, ..Product::new(x.rows(), inn, out) };
        self.product_with(w, p, x, bias, y);
    }

    /// dx = dy·W, or dx += dy·W.
    pub(super) fn frozen_product_back(&self, w: &Matrix, dy: &Tensor, accumulate: bool, dx: &mut Buffer) {
        let (out, inn) = w.shape;
        let p = Product { accumulate, ..Product::new(dy.rows(), out, inn) };
        self.product_with(w, p, dy, None, dx);
    }

    fn product_with(&self, w: &Matrix, p: Product, x: &Tensor, bias: Option<&Tensor>, y: &mut Buffer) {
        if p.m == 0 || p.n == 0 {
            return;
        }
        if p.k == 0 {
            return self.empty_sum(p, bias, y);
        }
        let n = w.shape.0 * w.shape.1;
        let expanded;
        let weights = match &w.form {
            Form::Dense(memory) => memory.arg(),
            Form::FourBit(form) => {
                expanded = self.take(n * element_bytes(w.precision));
                let (bf16, f32) = match w.precision {
                    Precision::Bf16 => (expanded.arg(), Arg::NULL),
                    Precision::F32 => (Arg::NULL, expanded.arg()),
                };
                expand(self, form, n, bf16, f32);
                expanded.arg()
            }
        };
        let places = |a: Arg, b: Arg| Places {
            a: a.address(),
            b: b.address(),
            bias: bias.map_or(0, |bias| bias.arg().address()),
            y: y.arg().address(),
        };
        if w.precision == Precision::F32 {
            let _ = self.multiply(Kind::F32, p, places(x.arg(), weights));
            return;
        }
        let short = x.bf16(self);
        if !self.multiply(Kind::Bf16, p, places(short, weights)) {
            let (left, right) = (self.take(4 * x.len()), self.take(4 * n));
            self.widen(short, left.arg(), x.len());
            self.widen(weights, right.arg(), n);
            let _ = self.multiply(Kind::F32, p, places(left.arg(), right.arg()));
        }
    }

    /// A sum of no products: zeros or what was there, and the bias.
    pub(super) fn empty_sum(&self, p: Product, bias: Option<&Tensor>, y: &mut Buffer) {
        if !p.accumulate {
            self.fill(0.0, y);
        }
        if let Some(bias) = bias {
            self.accumulate(bias, y);
        }
    }
}
