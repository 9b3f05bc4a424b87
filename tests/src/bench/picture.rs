//! A table of systems beside each other, as text for a terminal and as a picture for the README.
//!
//! Owns layout only. The picture is an SVG of plain bars without a background: its ink follows the reader's light or dark
//! scheme. Each figure of a panel is scaled to the largest of that panel; what was not measured has no bar.

use std::fmt::{self, Write};

/// What is compared, in the order of the columns.
pub const COLUMNS: [Column; 5] = [
    Column::new("total time", "s", 2),
    Column::new("longest gap", "ms", 0),
    Column::new("on the wire", "MiB", 0),
    Column::new("CPU, both sides", "s", 1),
    Column::new("sent / distinct", "", 2),
];

const NAME_WIDTH: f64 = 170.0;
const COLUMN_WIDTH: f64 = 140.0;
/// Of a column, for the bar; the rest is for the figure.
const BAR_WIDTH: f64 = 80.0;
const ROW_HEIGHT: f64 = 22.0;
const BAR_HEIGHT: f64 = 13.0;
const PANEL_HEAD: f64 = 50.0;
const PANEL_FOOT: f64 = 12.0;
const MARGIN: f64 = 10.0;
const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600;font-size:13px}.column,.note{fill:#59636e}\
.ours{fill:#0969da}.other{fill:#8c959f}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.column,.note{fill:#9198a1}.ours{fill:#4493f8}.other{fill:#656c76}}";

/// One figure of every row.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    name: &'static str,
    unit: &'static str,
    digits: usize,
}

impl Column {
    const fn new(name: &'static str, unit: &'static str, digits: usize) -> Self {
        Self { name, unit, digits }
    }

    fn head(&self) -> String {
        match self.unit {
            "" => self.name.to_owned(),
            unit => format!("{}, {unit}", self.name),
        }
    }
}

/// One system.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Whether it is ours.
    pub ours: bool,
    /// A figure per column; NaN where there is none.
    pub figures: [f64; COLUMNS.len()],
}

/// Systems that did the same thing.
#[derive(Debug, Clone)]
pub struct Panel {
    /// What they did.
    pub title: String,
    /// Each.
    pub rows: Vec<Row>,
}

impl Panel {
    fn height(&self) -> f64 {
        let rows = f64::from(u32::try_from(self.rows.len()).unwrap_or(u32::MAX));
        PANEL_HEAD + ROW_HEIGHT * rows + PANEL_FOOT
    }

    fn largest(&self, column: usize) -> f64 {
        let figures = self.rows.iter().map(|row| row.figures[column]);
        figures.fold(0.0, f64::max)
    }
}

/// The table, for a terminal.
impl fmt::Display for Panel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        write!(f, "  {:<24}", "")?;
        for column in COLUMNS {
            write!(f, " {:>18}", column.head())?;
        }
        for row in &self.rows {
            write!(f, "\n  {:<24}", row.name)?;
            for (figure, column) in row.figures.iter().zip(COLUMNS) {
                write!(f, " {:>18}", shown(*figure, column.digits))?;
            }
        }
        Ok(())
    }
}

fn shown(figure: f64, digits: usize) -> String {
    if figure.is_finite() {
        format!("{figure:.digits$}")
    } else {
        "–".to_owned()
    }
}

/// The picture; `note` says how it was taken.
#[must_use]
pub fn draw(panels: &[Panel], note: &str) -> String {
    let columns = f64::from(u32::try_from(COLUMNS.len()).unwrap_or(u32::MAX));
    let width = MARGIN * 2.0 + NAME_WIDTH + COLUMN_WIDTH * columns;
    let height = panels.iter().map(Panel::height).sum::<f64>() + MARGIN * 2.0 + ROW_HEIGHT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\">\n\
         <title>Moving one guest: vmferry beside QEMU's own migration</title>\n<style>{STYLE}</style>\n"
    );
    let mut top = MARGIN;
    for panel in panels {
        draw_panel(&mut svg, panel, top);
        top += panel.height();
    }
    text(&mut svg, "note", (MARGIN, top + ROW_HEIGHT), note);
    svg.push_str("</svg>\n");
    svg
}

fn draw_panel(svg: &mut String, panel: &Panel, top: f64) {
    text(svg, "title", (MARGIN, top + 16.0), &panel.title);
    for (index, column) in COLUMNS.iter().enumerate() {
        text(svg, "column", (left(index), top + 38.0), &column.head());
    }
    let mut y = top + PANEL_HEAD;
    for row in &panel.rows {
        text(svg, "name", (MARGIN, y + BAR_HEIGHT - 2.0), &row.name);
        for (index, figure) in row.figures.iter().enumerate() {
            let mut at = left(index);
            if figure.is_finite() {
                let length = figure / panel.largest(index).max(f64::MIN_POSITIVE) * BAR_WIDTH;
                let class = if row.ours { "ours" } else { "other" };
                add(
                    svg,
                    format_args!(
                        "<rect class=\"{class}\" x=\"{at:.1}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{BAR_HEIGHT}\" rx=\"2\"/>\n"
                    ),
                );
                at += length + 5.0;
            }
            let figure = shown(*figure, COLUMNS[index].digits);
            text(svg, "figure", (at, y + BAR_HEIGHT - 2.0), &figure);
        }
        y += ROW_HEIGHT;
    }
}

fn left(column: usize) -> f64 {
    MARGIN + NAME_WIDTH + COLUMN_WIDTH * f64::from(u32::try_from(column).unwrap_or(u32::MAX))
}

fn text(svg: &mut String, class: &str, (x, y): (f64, f64), words: &str) {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    add(
        svg,
        format_args!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>\n"),
    );
}

fn add(svg: &mut String, what: fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = svg.write_fmt(what);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel() -> Panel {
        let row = |name: &str, ours, total| Row {
            name: name.to_owned(),
            ours,
            figures: [total, 30.0, 200.0, 4.0, f64::NAN],
        };
        Panel {
            title: "1000 Mbit/s & 20 ms".to_owned(),
            rows: vec![row("vmferry", true, 2.0), row("QEMU, TLS", false, 8.0)],
        }
    }

    #[test]
    fn bars_are_to_scale_and_ours_stands_out() {
        let svg = draw(&[panel()], "medians of 5 runs");
        assert!(svg.contains("class=\"ours\" x=\"180.0\" y=\"60.0\" width=\"20.0\""));
        assert!(svg.contains("class=\"other\" x=\"180.0\" y=\"82.0\" width=\"80.0\""));
        assert!(svg.contains("1000 Mbit/s &amp; 20 ms"));
        assert!(svg.contains("prefers-color-scheme:dark"));
        // Four figures in each of two rows; the fifth was not measured.
        assert_eq!(svg.matches("<rect").count(), 8);
        assert_eq!(svg.matches(">–<").count(), 2);
    }

    #[test]
    fn the_table_has_a_line_per_system() {
        let table = panel().to_string();
        assert_eq!(table.lines().count(), 4);
        assert!(table.lines().nth(3).unwrap().contains("8.0"));
    }
}
