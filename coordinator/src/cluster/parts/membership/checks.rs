//! What a newcomer is checked for: that it computes the same job, from the same weights and to the same bits as the others.

use proto::v1;

use super::{Membership, short};
use crate::cluster::event::WorkerId;

impl Membership {
    /// Checks a newcomer against the run and against those who are here.
    pub fn check_join(
        &self,
        join: &v1::Join,
        version: &str,
        job_digest: &str,
        numerics_class: Option<&str>,
    ) -> Result<(), String> {
        if join.version != version {
            return Err(format!(
                "worker {} runs Muster {} but the coordinator runs {version}; install the same version on both",
                join.name, join.version
            ));
        }
        if !join.job_digest.is_empty() && join.job_digest != job_digest {
            return Err(format!(
                "worker {} holds the state of job {} but this coordinator runs job {}",
                join.name,
                short(&join.job_digest),
                short(job_digest)
            ));
        }
        let present = self.workers.values().next();
        let class = numerics_class.or(present.map(|worker| worker.numerics_class.as_str()));
        match class {
            Some(class) if class != join.numerics_class => Err(format!(
                "worker {} is of numerics class {} but this run is of class {class}; workers of different classes would \
                 not give the same bits",
                join.name, join.numerics_class
            )),
            _ => Ok(()),
        }
    }

    /// Checks what a worker loaded against the run and against those who are ready.
    pub fn check_ready(
        &self,
        id: WorkerId,
        ready: &v1::Ready,
        job_digest: &str,
        reached: u64,
    ) -> Result<(), String> {
        let name = self.name(id);
        if ready.job_digest != job_digest {
            return Err(format!(
                "worker {name} reads the job as {} but the coordinator reads it as {}; install the same build on both",
                short(&ready.job_digest),
                short(job_digest)
            ));
        }
        if ready.step > reached {
            return Err(format!(
                "worker {name} holds the weights after {} steps but this run has reached only {reached}",
                ready.step
            ));
        }
        for peer in self.workers.values() {
            let Some(theirs) = &peer.ready else { continue };
            if theirs.layout_digest != ready.layout_digest
                || theirs.trainable_scalars != ready.trainable_scalars
            {
                return Err(format!(
                    "worker {name} has the trainable layout {} but worker {} has {}",
                    short(&ready.layout_digest),
                    peer.name,
                    short(&theirs.layout_digest)
                ));
            }
            if theirs.step == ready.step && theirs.weights_digest != ready.weights_digest {
                return Err(format!(
                    "worker {name} starts with the weights {} but worker {} started with {}",
                    short(&ready.weights_digest),
                    peer.name,
                    short(&theirs.weights_digest)
                ));
            }
        }
        Ok(())
    }
}
