//! One example as the model sees it, with what is learned marked: the quickest way to find a wrong template or mask.

use common::data::Sample;

use super::text::{Style, cut, grouped, indent, visible};

/// Most characters of a sample that are shown, a screenful. The rest is counted.
const MAX_CHARACTERS: usize = 1500;

pub(super) fn render(sample: &Sample, style: Style) -> String {
    let trained = sample.labels.iter().filter(|label| **label >= 0).count() as u64;
    let tokens = sample.input_ids.len() as u64;
    let how = match style.colour {
        true => style.trained("like this"),
        false => "⟦like this⟧".to_owned(),
    };
    let title = style.bold("sample");
    let mut text = format!(
        "\n{title}  {} tokens, {} of them learned, marked {how}:\n",
        grouped(tokens),
        grouped(trained)
    );
    let (body, left_out) = body(sample, style);
    text += &indent(&body, "  ");
    if left_out > 0 {
        text += &style.dim(&format!(
            "  … and {} more characters",
            grouped(left_out as u64)
        ));
        text.push('\n');
    }
    text.push('\n');
    text
}

fn body(sample: &Sample, style: Style) -> (String, usize) {
    let (mut body, mut left_out, mut room) = (String::new(), 0, MAX_CHARACTERS);
    for span in &sample.spans {
        let (shown, more) = cut(&visible(&span.text), room);
        room -= shown.chars().count();
        left_out += more;
        if !span.trained || shown.is_empty() {
            body += &shown;
        } else if style.colour {
            // Colours end with the line, or some terminals paint the margin.
            let lines: Vec<String> = shown.split('\n').map(|line| style.trained(line)).collect();
            body += &lines.join("\n");
        } else {
            body += &format!("⟦{shown}⟧");
        }
    }
    (body, left_out)
}
