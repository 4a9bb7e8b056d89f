//! The feed-forward half of a decoder layer with experts: `x + Σ w_e · expert_e(norm(x))` over the few experts of each token, and
//! perhaps one that every token goes through.
//!
//! Experts compute one after the other, each its tokens at once, so that a layer holds the activations of one expert beside what it
//! keeps. What comes out is added in their order.

use super::expert::{Expert, Gating};
use super::shared_expert::{SharedActivations, SharedExpert};
use super::{Pass, norm_backward, norm_forward};
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::projection::{Context, LowRank, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::router_loss::RouterLoss;
use crate::engine::ops::routing::{Group, Routes, Routing};
use crate::engine::ops::token_rows::{
    add_products_with, add_rows, add_weighted, dots, gather, gather_rounded, scale,
};
use crate::engine::ops::{add_in_place, add_partials, round_into, scale_in_place};
use crate::engine::params::Weight;

/// The feed-forward half of a decoder layer with experts.
pub struct Experts {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    pub router: Projection,
    /// What the router reads in place of what the experts do, and what it multiplies by, where it has such.
    pub own_routing: Option<OwnRouting>,
    pub routing: Routing,
    pub experts: Vec<Expert>,
    pub shared: Option<SharedExpert>,
    /// What is between an expert's layers.
    pub gating: Gating,
}

/// What a router of Gemma 4 has of its own.
pub struct OwnRouting {
    /// Of what it reads, the residual.
    pub norm: RmsNorm,
    /// What logits are multiplied by.
    pub factor: f32,
    /// What the weight of each expert is multiplied by.
    pub scales: Weight,
}

/// What the backward pass needs beside the input. The norm and what `down` reads are computed again.
pub struct ExpertActivations<E> {
    /// Of each expert for each token, `[tokens][experts]`.
    probabilities: Buffer<f32>,
    /// Output of the gate and up projections, a row for each token in each of its experts, `[rows][2 * intermediate]`.
    gate_up: Buffer<E>,
    shared: Option<SharedActivations<E>>,
}

#[cfg(test)]
impl<E: Element> ExpertActivations<E> {
    pub fn bytes(&self) -> usize {
        let Self {
            probabilities,
            gate_up,
            shared,
        } = self;
        let shared = shared.as_ref().map_or(0, SharedActivations::bytes);
        size_of_val(&probabilities[..]) + size_of_val(&gate_up[..]) + shared
    }
}

/// Buffers that the backward pass of one expert after the other takes, for as many rows as the largest has.
struct Scratch<E> {
    dy: Buffer<E>,
    dh: Buffer<f32>,
    h: Buffer<E>,
    d_gate_up: Buffer<E>,
    d_read: Buffer<f32>,
}

impl Experts {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        let shared = self.shared.as_ref();
        let shared = shared.map_or(0, |shared| shared.kept_bytes(element));
        let rows = self.routing.per_token * 2 * self.width();
        self.routing.experts * size_of::<f32>() + rows * element + shared
    }

    /// Runs forward up to the last activations that backward reads. `x` is `[tokens][hidden]`.
    pub fn forward_saving<E: Element>(&self, x: &[f32], pass: Pass) -> ExpertActivations<E> {
        let (pool, hidden) = (pass.pool, self.hidden());
        let normed = norm_forward::<E>(&self.norm, x, pass);
        let mut probabilities = pool.take(pass.tokens() * self.routing.experts);
        {
            let routed = self.routed::<E>(x, pass);
            let routed = routed.as_ref().unwrap_or(&normed);
            self.router
                .forward_wide(routed, &mut probabilities, pass.context());
        }
        if let Some(own) = &self.own_routing {
            scale_in_place(&mut probabilities, own.factor);
        }
        self.routing.softmax(&mut probabilities);
        let routes = self.routes(&probabilities);
        let mut gate_up = pool.take(routes.rows() * 2 * self.width());
        let mut read = pool.take::<E>(routes.largest() * hidden);
        for (expert, group) in self.occupied(&routes) {
            let read = &mut read[..group.tokens.len() * hidden];
            gather(&normed, group.tokens, read, hidden);
            let gate_up = &mut gate_up[self.of_rows(&group)];
            expert.gate_up.forward(read, gate_up, context(&group, pass));
        }
        let shared = self.shared.as_ref();
        ExpertActivations {
            probabilities,
            gate_up,
            shared: shared.map(|shared| shared.forward_saving(&normed, pass)),
        }
    }

    /// Takes note of the layer for the router's loss.
    pub fn add_to<E>(&self, loss: &RouterLoss, activations: &ExpertActivations<E>) {
        let routes = self.routes(&activations.probabilities);
        loss.add(&activations.probabilities, &routes);
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output<E: Element>(
        &self,
        x: &[f32],
        activations: &ExpertActivations<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let mut y = pass.pool.take(x.len());
        y.copy_from_slice(x);
        self.forward_onto(activations, &mut y, pass);
        y
    }

    /// Adds what the experts give to `y`, `[tokens][hidden]`.
    pub fn forward_onto<E: Element>(
        &self,
        activations: &ExpertActivations<E>,
        y: &mut [f32],
        pass: Pass,
    ) {
        let (pool, width, hidden) = (pass.pool, self.width(), self.hidden());
        let routes = self.routes(&activations.probabilities);
        let mut h = pool.take::<E>(routes.largest() * width);
        let mut results = pool.take::<f32>(routes.largest() * hidden);
        for (expert, group) in self.occupied(&routes) {
            let rows = group.tokens.len();
            let (h, results) = (&mut h[..rows * width], &mut results[..rows * hidden]);
            let gate_up = &activations.gate_up[self.of_rows(&group)];
            self.gating.forward(gate_up, h, width);
            expert.down.forward_wide(h, results, context(&group, pass));
            add_weighted(y, group.tokens, results, group.weights, hidden);
        }
        if let (Some(shared), Some(activations)) = (&self.shared, &activations.shared) {
            shared.forward_onto(activations, y, pass);
        }
    }

    /// What the router reads, where that is not what the experts do.
    fn routed<E: Element>(&self, x: &[f32], pass: Pass) -> Option<Buffer<E>> {
        let own = self.own_routing.as_ref()?;
        let mut routed = pass.pool.take(x.len());
        own.norm.forward(x, &mut routed[..]);
        Some(routed)
    }

    fn routes(&self, probabilities: &[f32]) -> Routes {
        let routes = self.routing.routes(probabilities);
        match &self.own_routing {
            None => routes,
            Some(own) => routes.scaled_by(&own.scales.read_f32()),
        }
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: ExpertActivations<E>,
        gradient: &mut [f32],
        pass: Pass,
    ) {
        let d_read = self.backward_to_input(x, activations, gradient, pass);
        self.backward_to_residual(x, &d_read, gradient);
    }

    /// Adds the gradient of `x` to `gradient`, from those that [`Self::backward_to_input`] gives.
    pub fn backward_to_residual(
        &self,
        x: &[f32],
        (d_normed, d_routed): &(Buffer<f32>, Option<Buffer<f32>>),
        gradient: &mut [f32],
    ) {
        norm_backward(&self.norm, x, d_normed, gradient);
        if let (Some(own), Some(d_routed)) = (&self.own_routing, d_routed) {
            own.norm.backward(x, d_routed, gradient);
        }
    }

    /// The gradients of what the experts read, and of what the router does where that is something else, from that of what they add.
    pub fn backward_to_input<E: Element>(
        &self,
        x: &[f32],
        activations: ExpertActivations<E>,
        gradient: &[f32],
        pass: Pass,
    ) -> (Buffer<f32>, Option<Buffer<f32>>) {
        let normed = norm_forward::<E>(&self.norm, x, pass);
        let routes = self.routes(&activations.probabilities);
        let mut d_normed = pass.pool.zeroed::<f32>(x.len());
        let mut d_weights = vec![0.0; routes.rows()];
        let mut scratch = self.scratch::<E>(&routes, pass);
        for (expert, group) in self.experts.iter().zip(routes.groups()) {
            if group.tokens.is_empty() {
                expert.hand_over_zeros();
                continue;
            }
            let gate_up = &activations.gate_up[self.of_rows(&group)];
            let d_weights = &mut d_weights[group.rows.clone()];
            let low_rank = self.backward_to_read(
                (expert, &group),
                gate_up,
                gradient,
                (&mut scratch, d_weights),
                pass,
            );
            let rows = group.tokens.len();
            let d_read = &scratch.d_read[..rows * self.hidden()];
            add_rows(&mut d_normed, group.tokens, d_read, self.hidden());
            if expert.learns() {
                self.backward_weights((expert, &group), &normed, (&mut scratch, low_rank), pass);
            }
        }
        drop(scratch);
        let routed = self.routed::<E>(x, pass);
        let mut d_routed = routed.as_ref().map(|_| pass.pool.zeroed::<f32>(x.len()));
        if let Some(own) = &self.own_routing {
            let d_scales = routes.unscale(&mut d_weights, &own.scales.read_f32());
            own.scales.add_gradient(|_, gradient, accumulate| {
                add_partials(gradient, accumulate, std::slice::from_ref(&d_scales));
            });
        }
        self.backward_router(
            (
                routed.as_ref().unwrap_or(&normed),
                &activations.probabilities,
            ),
            (&routes, &d_weights),
            d_routed.as_mut().unwrap_or(&mut d_normed),
            pass,
        );
        if let (Some(shared), Some(activations)) = (&self.shared, activations.shared) {
            shared.backward(&normed, activations, gradient, &mut d_normed, pass);
        }
        (d_normed, d_routed)
    }

    /// Goes backward through an expert, to what it reads and to the weight of each of its rows. Returns the gradients of the low-rank
    /// parts of gate and up, and of down, the latter without the weight.
    ///
    /// With `y = w · down(h)` the weight's gradient is `down(h) · dy`, which is `h · dh` where `dh` is that of `h` without the weight,
    /// and `bias · dy` besides where there is a bias.
    fn backward_to_read<E: Element>(
        &self,
        (expert, group): (&Expert, &Group),
        gate_up: &[E],
        gradient: &[f32],
        (scratch, d_weights): (&mut Scratch<E>, &mut [f32]),
        pass: Pass,
    ) -> [LowRank<E>; 2] {
        let (width, hidden, rows) = (self.width(), self.hidden(), group.tokens.len());
        let context = context(group, pass);
        let dy = &mut scratch.dy[..rows * hidden];
        let dh = &mut scratch.dh[..rows * width];
        let h = &mut scratch.h[..rows * width];
        let d_gate_up = &mut scratch.d_gate_up[..rows * 2 * width];
        gather_rounded(gradient, group.tokens, dy, hidden);
        let of_down = expert.down.backward_input(dy, dh, context);
        self.gating.forward(gate_up, h, width);
        dots(dh, h, d_weights, width);
        if let Some(bias) = expert.down.bias() {
            add_products_with(dy, &bias.read_f32(), d_weights);
        }
        scale(dh, group.weights, width);
        self.gating.backward(gate_up, dh, (d_gate_up, h), width);
        let d_read = &mut scratch.d_read[..rows * hidden];
        let of_gate_up = expert.gate_up.backward_input(d_gate_up, d_read, context);
        [of_gate_up, of_down]
    }

    /// Hands over the gradients of an expert's weights, once [`Self::backward_to_read`] has filled the buffers.
    fn backward_weights<E: Element>(
        &self,
        (expert, group): (&Expert, &Group),
        normed: &[E],
        (scratch, [of_gate_up, of_down]): (&mut Scratch<E>, [LowRank<E>; 2]),
        pass: Pass,
    ) {
        let (width, hidden, rows) = (self.width(), self.hidden(), group.tokens.len());
        let context = context(group, pass);
        let h = &mut scratch.h[..rows * width];
        let dy = &mut scratch.dy[..rows * hidden];
        match expert.down.bias().filter(|bias| bias.is_trainable()) {
            None => scale(h, group.weights, width),
            // The bias has the weight, too.
            Some(_) => scale(dy, group.weights, hidden),
        }
        expert.down.backward_weights(h, dy, &of_down, context);
        let mut read = pass.pool.take::<E>(rows * hidden);
        gather(normed, group.tokens, &mut read, hidden);
        let d_gate_up = &scratch.d_gate_up[..rows * 2 * width];
        expert
            .gate_up
            .backward_weights(&read, d_gate_up, &of_gate_up, context);
    }

    /// Goes backward through the router, and adds to the gradient of what it reads.
    fn backward_router<E: Element>(
        &self,
        (routed, probabilities): (&[E], &[f32]),
        (routes, d_weights): (&Routes, &[f32]),
        d_routed: &mut [f32],
        pass: Pass,
    ) {
        let mut d_logits = pass.pool.take::<f32>(probabilities.len());
        let of_loss = pass.router_loss.map(RouterLoss::gradient);
        self.routing.backward(
            probabilities,
            (routes, d_weights),
            of_loss.as_deref(),
            &mut d_logits,
        );
        if let Some(own) = &self.own_routing {
            scale_in_place(&mut d_logits, own.factor);
        }
        let mut dy = pass.pool.take::<E>(d_logits.len());
        round_into(&d_logits, &mut dy);
        let mut through = pass.pool.take::<f32>(d_routed.len());
        let context = pass.context();
        let du = self.router.backward_input(&dy[..], &mut through, context);
        add_in_place(d_routed, &through);
        if self.router.learns() {
            let u = self.router.low_rank(routed, context);
            self.router.backward_weights(routed, &u, &dy, &du, context);
        }
    }

    /// The experts that some tokens go through, with their rows.
    fn occupied<'a>(&'a self, routes: &'a Routes) -> impl Iterator<Item = (&'a Expert, Group<'a>)> {
        let all = self.experts.iter().zip(routes.groups());
        all.filter(|(_, group)| !group.tokens.is_empty())
    }

    fn scratch<E: Element>(&self, routes: &Routes, pass: Pass) -> Scratch<E> {
        let (pool, rows) = (pass.pool, routes.largest());
        let (width, hidden) = (self.width(), self.hidden());
        Scratch {
            dy: pool.take(rows * hidden),
            dh: pool.take(rows * width),
            h: pool.take(rows * width),
            d_gate_up: pool.take(rows * 2 * width),
            d_read: pool.take(rows * hidden),
        }
    }

    /// Where the gate and up projections of a group are among those of all rows.
    fn of_rows(&self, group: &Group) -> std::ops::Range<usize> {
        let width = 2 * self.width();
        group.rows.start * width..group.rows.end * width
    }

    /// Intermediate size of an expert.
    fn width(&self) -> usize {
        self.experts
            .first()
            .map_or(0, |expert| expert.gate_up.out() / 2)
    }

    fn hidden(&self) -> usize {
        self.experts.first().map_or(0, |expert| expert.down.out())
    }
}

/// What a run of a group's rows needs. Nothing in an expert is dropped.
fn context<'a>(group: &Group, pass: Pass<'a>) -> Context<'a> {
    Context {
        tokens: group.tokens.len(),
        mask: None,
        pool: pass.pool,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
