//! The tape: reverse-mode differentiation over what needs a gradient, and nothing else.
//!
//! An operation is recorded only when one of its inputs is on the tape; its closure holds just what its own gradient
//! needs and is dropped as soon as backward has run it. Nodes carry increasing numbers, so the largest number not yet
//! visited is always ready: backward needs no sorting, and a checkpoint may add nodes while it runs.

mod terms;

use std::cell::Cell;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::device::Buffer;
use crate::error::{Error, Result, shape_error};
use crate::param::Param;
use crate::tensor::Tensor;

pub use terms::Terms;

type Backward = Box<dyn FnOnce(Tensor, &mut Sink) -> Result<()> + Send>;

/// One recorded operation, or a leaf (a trainable tensor).
pub(crate) struct Node {
    id: u64,
    name: &'static str,
    backward: Mutex<Option<Backward>>,
    leaf: bool,
}

impl Node {
    pub(crate) fn new(name: &'static str, backward: Option<Backward>) -> Arc<Node> {
        let leaf = backward.is_none();
        Arc::new(Node { id: next_number(), name, backward: Mutex::new(backward), leaf })
    }
}

/// A number larger than that of every node so far.
fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

/// Where an input's gradient goes: its node, or nowhere.
#[derive(Clone)]
pub(crate) struct Edge(pub(crate) Option<Arc<Node>>);

impl Edge {
    /// Whether anyone wants this gradient; kernels skip work for those that nobody wants.
    pub(crate) fn wanted(&self) -> bool {
        self.0.is_some()
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Record,
    /// Nothing is recorded.
    Off,
    /// Nothing is recorded, but whether something would have been is noted (see [`checkpoint`]).
    Watch,
}

thread_local! {
    static MODE: Cell<Mode> = const { Cell::new(Mode::Record) };
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

fn with_mode<T>(mode: Mode, f: impl FnOnce() -> T) -> T {
    struct Restore(Mode);
    impl Drop for Restore {
        fn drop(&mut self) {
            MODE.set(self.0);
        }
    }
    let _restore = Restore(MODE.replace(mode));
    f()
}

/// What holds on this thread: whether operations are recorded.
#[derive(Clone, Copy)]
pub(crate) struct Recording(Mode);

impl Recording {
    pub(crate) fn here() -> Recording {
        Recording(MODE.get())
    }

    /// Runs `f` with this in place of what holds here.
    pub(crate) fn apply<T>(self, f: impl FnOnce() -> T) -> T {
        with_mode(self.0, f)
    }
}

/// Runs `f` with nothing recorded.
pub fn no_grad<T>(f: impl FnOnce() -> T) -> T {
    with_mode(Mode::Off, f)
}

/// A trainable leaf: `value` at `node`, on the tape if recording is on.
pub(crate) fn leaf(value: Tensor, node: &Arc<Node>) -> Tensor {
    match MODE.get() {
        Mode::Record => value.with_node(Some(node.clone())),
        Mode::Off => value,
        Mode::Watch => {
            WATCHED.set(true);
            value
        }
    }
}

impl Tensor {
    /// Puts `self`, the result of an operation on `inputs`, on the tape if any input is.
    pub(crate) fn on_tape(
        self,
        name: &'static str,
        inputs: &[&Tensor],
        backward: impl FnOnce(Tensor, &mut Sink) -> Result<()> + Send + 'static,
    ) -> Tensor {
        if !inputs.iter().any(|x| x.needs_grad()) {
            return self;
        }
        match MODE.get() {
            Mode::Record => self.with_node(Some(Node::new(name, Some(Box::new(backward))))),
            Mode::Off => self,
            Mode::Watch => {
                WATCHED.set(true);
                self
            }
        }
    }

    /// The same values; backward shows their gradient, of the same shape, to `look` as it passes. Recorded whether or not
    /// anything below is, so that gradients may be seen where nothing is trained.
    pub fn observe(&self, look: impl FnOnce(&Tensor) -> Result<()> + Send + 'static) -> Tensor {
        let edge = self.edge();
        let backward = move |dy: Tensor, sink: &mut Sink| {
            look(&dy)?;
            sink.add(&edge, dy)
        };
        match MODE.get() {
            Mode::Record => self.detach().with_node(Some(Node::new("observe", Some(Box::new(backward))))),
            Mode::Off => self.clone(),
            Mode::Watch => {
                WATCHED.set(true);
                self.clone()
            }
        }
    }

    /// Gradients of this scalar with respect to every [`Param`] it was computed from.
    pub fn backward(&self) -> Result<Gradients> {
        if self.len() != 1 {
            return shape_error("backward", "a scalar", format!("{:?}", self.shape()));
        }
        self.backward_from(Tensor::full(1.0, self.shape()))
    }

    /// Like [`Tensor::backward`], from a given gradient of this tensor.
    pub fn backward_from(&self, dy: Tensor) -> Result<Gradients> {
        let mut sink = Sink::default();
        sink.add(&self.edge(), dy)?;
        let leaves = sink.run(0)?;
        Ok(Gradients { by_leaf: leaves.into_iter().map(|(node, dy)| (node.id, dy)).collect() })
    }
}

fn poisoned() -> Error {
    Error::Backward("an earlier panic left the tape unusable".into())
}

/// Collects gradients while backward runs.
#[derive(Default)]
pub(crate) struct Sink {
    pending: HashMap<u64, Tensor>,
    ready: BinaryHeap<ByNumber>,
    leaves: Vec<(Arc<Node>, Tensor)>,
}

impl Sink {
    /// Runs backward from what was added, through nodes from number `first` on; what reached the leaves, and older nodes.
    fn run(mut self, first: u64) -> Result<Vec<(Arc<Node>, Tensor)>> {
        no_grad(|| {
            while let Some(next) = self.ready.pop() {
                let Some(dy) = self.pending.remove(&next.0.id) else { continue };
                let node = next.0;
                if node.leaf || node.id < first {
                    self.leaves.push((node, dy));
                    continue;
                }
                let backward = node.backward.lock().map_err(|_| poisoned())?.take();
                let Some(backward) = backward else {
                    return Err(Error::Backward(format!(
                        "{} was already passed; run forward again",
                        node.name
                    )));
                };
                backward(dy, &mut self)?;
            }
            Ok(self.leaves)
        })
    }

    /// Adds `gradient` to what `edge` has received so far.
    pub(crate) fn add(&mut self, edge: &Edge, gradient: Tensor) -> Result<()> {
        let Some(node) = &edge.0 else { return Ok(()) };
        let gradient = gradient.detach();
        match self.pending.remove(&node.id) {
            None => {
                self.pending.insert(node.id, gradient);
                self.ready.push(ByNumber(node.clone()));
            }
            Some(sum) => {
                self.pending.insert(node.id, accumulate(sum, gradient)?);
            }
        }
        Ok(())
    }

    /// Adds a gradient of `shape` that `compute` makes: it is given a buffer, and whether to add to what this holds or to
    /// overwrite it. So products add to what an input has received without a buffer and a pass of their own. Does nothing
    /// where nobody wants the gradient.
    pub(crate) fn grow(
        &mut self,
        edge: &Edge,
        shape: &[usize],
        compute: impl FnOnce(&mut Buffer, bool),
    ) -> Result<()> {
        let Some(node) = &edge.0 else { return Ok(()) };
        if let Some(sum) = self.pending.get_mut(&node.id)
            && sum.shape() == shape
            && let Some(buffer) = sum.sole_buffer()
        {
            compute(buffer, true);
            return Ok(());
        }
        let mut fresh = Buffer::f32(shape.iter().product());
        compute(&mut fresh, false);
        self.add(edge, Tensor::new(shape, fresh))
    }
}

/// `sum + more`, in place where `sum` is not shared.
fn accumulate(mut sum: Tensor, more: Tensor) -> Result<Tensor> {
    use crate::device::device;
    if sum.shape() != more.shape() {
        return shape_error("gradient", format!("{:?}", sum.shape()), format!("{:?}", more.shape()));
    }
    if let Some(buffer) = sum.sole_buffer() {
        device().accumulate(&more, buffer);
        return Ok(sum);
    }
    sum.add(&more)
}

/// Orders nodes by number for the heap.
struct ByNumber(Arc<Node>);

impl PartialEq for ByNumber {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}
impl Eq for ByNumber {}
impl PartialOrd for ByNumber {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for ByNumber {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.id.cmp(&other.0.id)
    }
}

/// Gradients by trainable tensor.
#[derive(Debug, Default)]
pub struct Gradients {
    by_leaf: HashMap<u64, Tensor>,
}

impl Gradients {
    /// The gradient of `param`, shape of the parameter; `None` if the loss does not depend on it.
    pub fn get(&self, param: &Param) -> Option<&Tensor> {
        self.by_leaf.get(&param.node().id)
    }

    /// Replaces the gradient of `param`.
    pub fn set(&mut self, param: &Param, gradient: Tensor) {
        self.by_leaf.insert(param.node().id, gradient);
    }

    /// Drops the gradient of `param`: an optimizer then leaves it as it is.
    pub fn remove(&mut self, param: &Param) {
        self.by_leaf.remove(&param.node().id);
    }

    /// Adds `other` to these (micro-batches of one step).
    pub fn add(&mut self, other: Gradients) -> Result<()> {
        for (id, more) in other.by_leaf {
            let sum = match self.by_leaf.remove(&id) {
                Some(sum) => accumulate(sum, more)?,
                None => more,
            };
            self.by_leaf.insert(id, sum);
        }
        Ok(())
    }
}

/// Runs `f` keeping only its inputs; backward runs it again to get what its gradients need.
///
/// `f` must be a function of its inputs, of parameters and of values that do not change between forward and backward
/// (dropout is drawn from counters, so it repeats itself).
pub fn checkpoint(
    inputs: &[&Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + 'static,
) -> Result<Tensor> {
    let kept: Vec<Tensor> = inputs.iter().map(|&x| x.clone()).collect();
    if MODE.get() != Mode::Record {
        return f(&kept);
    }
    let outer = WATCHED.replace(false);
    let out = with_mode(Mode::Watch, || f(&kept));
    let depends = WATCHED.replace(outer) || kept.iter().any(Tensor::needs_grad);
    let out = out?.detach();
    if !depends {
        return Ok(out);
    }
    let backward = move |dy: Tensor, sink: &mut Sink| {
        // The new nodes have the largest numbers, so the running loop visits them next.
        let again = with_mode(Mode::Record, || f(&kept))?;
        sink.add(&again.edge(), dy)
    };
    Ok(out.with_node(Some(Node::new("checkpoint", Some(Box::new(backward))))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Unary;
    use crate::testing::sample;

    fn loss_of(p: &Param, x: &Tensor) -> Result<Tensor> {
        x.matmul_t(&p.get())?.unary(Unary::Tanh)?.sum()
    }

    #[test]
    fn nothing_is_recorded_below_the_lowest_parameter() {
        let x = sample(&[2, 3], 1);
        assert!(!x.unary(Unary::Exp).unwrap().mul(&x).unwrap().needs_grad());
        let p = Param::new(sample(&[4, 3], 2));
        assert!(x.matmul_t(&p.get()).unwrap().needs_grad());
        assert!(!no_grad(|| x.matmul_t(&p.get())).unwrap().needs_grad());
        assert!(!x.matmul_t(&Param::frozen(sample(&[4, 3], 2)).get()).unwrap().needs_grad());
    }

    #[test]
    fn saved_tensors_are_freed_as_backward_passes() {
        use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
        struct Saved(Arc<AtomicUsize>);
        impl Drop for Saved {
            fn drop(&mut self) {
                self.0.fetch_add(1, SeqCst);
            }
        }
        let freed = Arc::new(AtomicUsize::new(0));
        let mut x = Param::new(sample(&[2], 1)).get();
        for depth in 0..5 {
            let (saved, seen, edge) = (Saved(freed.clone()), freed.clone(), x.edge());
            x = x.detach().on_tape("probe", &[&x], move |dy, sink| {
                let _saved = saved;
                assert_eq!(seen.load(SeqCst), 4 - depth, "what later operations saved is gone");
                sink.add(&edge, dy)
            });
        }
        x.sum().unwrap().backward().unwrap();
        assert_eq!(freed.load(SeqCst), 5);
    }

    #[test]
    fn a_gradient_is_seen_where_nothing_is_trained() {
        let seen: Arc<Mutex<Vec<Vec<f32>>>> = Arc::default();
        for checkpointed in [false, true] {
            let slot = seen.clone();
            let f = move |v: &[Tensor]| {
                let slot = slot.clone();
                Ok(v[0].observe(move |dy| {
                    slot.lock().unwrap().push(dy.to_vec()?);
                    Ok(())
                }))
            };
            let x = sample(&[3], 1);
            let y = if checkpointed { checkpoint(&[&x], f) } else { f(&[x]) }.unwrap();
            let gradients = y.unary(Unary::Square).unwrap().sum().unwrap().backward().unwrap();
            assert!(gradients.by_leaf.is_empty());
        }
        let expected: Vec<f32> = sample(&[3], 1).to_vec().unwrap().iter().map(|v| 2.0 * v).collect();
        assert_eq!(*seen.lock().unwrap(), [expected.clone(), expected]);
    }

    #[test]
    fn a_second_backward_is_an_error() {
        let p = Param::new(sample(&[4, 3], 2));
        let loss = loss_of(&p, &sample(&[2, 3], 1)).unwrap();
        loss.backward().unwrap();
        assert!(loss.backward().unwrap_err().to_string().contains("run forward again"));
    }

    #[test]
    fn a_checkpoint_changes_no_bit() {
        let (p, q) = (Param::new(sample(&[3, 3], 2)), Param::new(sample(&[3, 3], 3)));
        let run = |checkpointed: bool| {
            let x = sample(&[5, 3], 1);
            let first = q.get();
            let h = x.matmul_t(&first).unwrap();
            let inner = p.clone();
            let block = move |v: &[Tensor]| {
                v[0].matmul_t(&inner.get())?.unary(Unary::Tanh)?.dropout(0.5, 1, 2)?.add(&v[0])
            };
            let nested = move |v: &[Tensor]| {
                let block = block.clone();
                checkpoint(&[&v[0]], block)
            };
            let h = if checkpointed { checkpoint(&[&h], nested).unwrap() } else { nested(&[h]).unwrap() };
            let gradients = h.unary(Unary::Square).unwrap().sum().unwrap().backward().unwrap();
            [&p, &q].map(|p| gradients.get(p).unwrap().to_vec().unwrap())
        };
        assert_eq!(run(true), run(false));
    }

    #[test]
    fn a_checkpoint_reaches_parameters_when_its_input_has_no_gradient() {
        let p = Param::new(sample(&[3, 3], 2));
        let inner = p.clone();
        let y = checkpoint(&[&sample(&[2, 3], 1)], move |v| v[0].matmul_t(&inner.get())).unwrap();
        assert!(y.sum().unwrap().backward().unwrap().get(&p).is_some());
        let frozen = checkpoint(&[&sample(&[2, 3], 1)], |v| v[0].scale(2.0)).unwrap();
        assert!(!frozen.needs_grad());
    }

    #[test]
    fn host_reads_fail_inside_a_step() {
        let x = sample(&[2], 1);
        {
            let _step = crate::forbid_host_reads();
            assert!(matches!(x.to_vec(), Err(Error::HostRead)));
            assert!(crate::read_once(|| x.to_vec()).is_ok());
            assert!(matches!(x.to_vec(), Err(Error::HostRead)));
        }
        assert!(x.to_vec().is_ok());
    }
}
