//! Tokens become statements, by Jinja's grammar (`jinja2/parser.py`) with the extensions that Transformers turns on:
//! `break`, `continue` and `generation`.

mod expressions;
mod postfix;
mod words;

use std::sync::Arc;

use super::ast::{ExpressionKind, ForLoop, Macro, Statement, StatementKind, Step, Target};
use super::failure::Result;
use super::lexer::{Located, Token, syntax, tokenize};
use super::meter;
use super::value::Value;

/// Most levels of blocks and brackets in each other.
const MAX_NESTING: usize = 100;

/// Most operators, calls or filters in one chain.
const MAX_CHAIN: usize = 1000;

/// A template, and whether it says with `{% generation %}` what is learned.
pub fn parse(source: &str) -> Result<(Vec<Statement>, bool)> {
    let mut parser = Parser {
        tokens: tokenize(source)?,
        at: 0,
        nesting: 0,
        loops: 0,
        has_generation_marks: false,
    };
    let body = parser.body(&[])?;
    Ok((body, parser.has_generation_marks))
}

struct Parser {
    /// The last one is [`Token::End`].
    tokens: Vec<Located>,
    at: usize,
    nesting: usize,
    loops: usize,
    has_generation_marks: bool,
}

impl Parser {
    /// Statements up to one of these words at the beginning of a block, or up to the end of the source.
    fn body(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        self.nest(|parser| parser.statements(ends))
    }

    fn statements(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.next() {
                Token::Data(text) => StatementKind::Data(Value::text(text)),
                Token::VariableBegin => {
                    let printed = self.tuple(true)?;
                    self.expect(&Token::VariableEnd, "}}")?;
                    StatementKind::Print(printed)
                }
                Token::BlockBegin => {
                    let word = self.name()?;
                    if ends.contains(&word.as_str()) {
                        self.at -= 1;
                        return Ok(body);
                    }
                    self.block(&word, line)?
                }
                _ if ends.is_empty() => return Ok(body),
                _ => {
                    let wanted = ends.join(" %}` or `{% ");
                    return Err(syntax(format!("`{{% {wanted} %}}` is missing"), line));
                }
            };
            body.push(Statement { line, kind });
        }
    }

    fn block(&mut self, word: &str, line: usize) -> Result<StatementKind> {
        match word {
            "if" => self.if_block(),
            "for" => self.for_block(),
            "set" => self.set(),
            "macro" => self.macro_block(),
            "call" => self.call_block(line),
            "filter" => {
                let filters = self.filters(true)?;
                self.end_of_block()?;
                let body = self.body_until("endfilter")?;
                Ok(StatementKind::Filter { filters, body })
            }
            "with" => self.with(),
            "generation" => {
                self.has_generation_marks = true;
                self.end_of_block()?;
                let body = self.body_until("endgeneration")?;
                Ok(StatementKind::Generation(body))
            }
            "block" => {
                self.name()?;
                self.skip_to_end_of_block()?;
                let body = self.body(&["endblock"])?;
                self.skip_to_end_of_block()?;
                Ok(StatementKind::Block(body))
            }
            "print" => {
                let mut printed = self.tuple(true)?;
                self.end_of_block()?;
                // Several values are printed one after the other.
                if let ExpressionKind::Tuple(items) = printed.kind {
                    printed.kind = ExpressionKind::Concat(items);
                }
                Ok(StatementKind::Print(printed))
            }
            "break" | "continue" if self.loops > 0 => {
                self.end_of_block()?;
                Ok(if word == "break" {
                    StatementKind::Break
                } else {
                    StatementKind::Continue
                })
            }
            "break" | "continue" => Err(syntax(format!("`{word}` stands outside of a loop"), line)),
            "include" | "import" | "from" | "extends" => {
                self.skip_to_end_of_block()?;
                let known = ["include", "import", "from", "extends"];
                let name = known.into_iter().find(|name| *name == word);
                Ok(StatementKind::NoLoader(name.unwrap_or_default()))
            }
            other => Err(syntax(format!("unknown block `{other}`"), line)),
        }
    }

    fn body_until(&mut self, end: &str) -> Result<Vec<Statement>> {
        let body = self.body(&[end])?;
        self.name()?;
        self.end_of_block()?;
        Ok(body)
    }

    fn if_block(&mut self) -> Result<StatementKind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false)?;
            self.end_of_block()?;
            let body = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match self.name()?.as_str() {
                "elif" => {}
                "else" => {
                    self.end_of_block()?;
                    let otherwise = self.body_until("endif")?;
                    return Ok(StatementKind::If {
                        branches,
                        otherwise,
                    });
                }
                _ => {
                    self.end_of_block()?;
                    return Ok(StatementKind::If {
                        branches,
                        otherwise: Vec::new(),
                    });
                }
            }
        }
    }

    fn for_block(&mut self) -> Result<StatementKind> {
        let target = self.target(false)?;
        self.expect_name("in")?;
        let iterated = self.tuple(false)?;
        let condition = self
            .skip_name("if")
            .then(|| self.expression())
            .transpose()?;
        let recursive = self.skip_name("recursive");
        self.end_of_block()?;
        self.loops += 1;
        let body = self.body(&["else", "endfor"])?;
        self.loops -= 1;
        let has_else = self.name()? == "else";
        self.end_of_block()?;
        let otherwise = if has_else {
            self.body_until("endfor")?
        } else {
            Vec::new()
        };
        Ok(StatementKind::For(Arc::new(ForLoop {
            target,
            iterated,
            condition,
            recursive,
            body,
            otherwise,
        })))
    }

    fn set(&mut self) -> Result<StatementKind> {
        let target = self.target(true)?;
        if self.skip_operator("=") {
            let value = self.tuple(true)?;
            self.end_of_block()?;
            return Ok(StatementKind::Set { target, value });
        }
        let filters = self.filters(false)?;
        self.end_of_block()?;
        let body = self.body_until("endset")?;
        Ok(StatementKind::SetBlock {
            target,
            filters,
            body,
        })
    }

    fn with(&mut self) -> Result<StatementKind> {
        let mut variables = Vec::new();
        while *self.peek() != Token::BlockEnd {
            if !variables.is_empty() {
                self.expect_operator(",")?;
            }
            let target = self.target(false)?;
            self.expect_operator("=")?;
            variables.push((target, self.expression()?));
        }
        self.end_of_block()?;
        let body = self.body_until("endwith")?;
        Ok(StatementKind::With { variables, body })
    }

    fn macro_block(&mut self) -> Result<StatementKind> {
        let name = self.name()?;
        let parameters = self.signature()?;
        let node = self.macro_body(name, parameters, "endmacro")?;
        Ok(StatementKind::Macro(Arc::new(node)))
    }

    fn call_block(&mut self, line: usize) -> Result<StatementKind> {
        let parameters = if *self.peek() == Token::Operator("(") {
            self.signature()?
        } else {
            Vec::new()
        };
        let call = self.expression()?;
        let is_call = match &call.kind {
            ExpressionKind::Postfix { steps, .. } => {
                matches!(
                    steps.last(),
                    Some(Step {
                        kind: super::ast::StepKind::Call(_),
                        ..
                    })
                )
            }
            _ => false,
        };
        if !is_call {
            return Err(syntax(
                "`call` needs a call, as in `{% call name() %}`",
                line,
            ));
        }
        let caller = self.macro_body("caller".to_owned(), parameters, "endcall")?;
        Ok(StatementKind::Call {
            caller: Arc::new(caller),
            call,
        })
    }

    fn macro_body(
        &mut self,
        name: String,
        parameters: Vec<(String, Option<super::ast::Expression>)>,
        end: &str,
    ) -> Result<Macro> {
        self.end_of_block()?;
        let first = self.at;
        let loops = std::mem::take(&mut self.loops);
        let body = self.body_until(end)?;
        self.loops = loops;
        let words = &self.tokens[first..self.at];
        let uses = |name: &str| {
            words
                .iter()
                .any(|word| matches!(&word.token, Token::Name(found) if found == name))
        };
        Ok(Macro {
            uses_varargs: uses("varargs"),
            uses_kwargs: uses("kwargs"),
            uses_caller: uses("caller"),
            name,
            parameters,
            body,
        })
    }

    fn signature(&mut self) -> Result<Vec<(String, Option<super::ast::Expression>)>> {
        self.expect_operator("(")?;
        let mut parameters = Vec::new();
        while !self.skip_operator(")") {
            if !parameters.is_empty() {
                self.expect_operator(",")?;
            }
            let name = self.name()?;
            let default = self
                .skip_operator("=")
                .then(|| self.expression())
                .transpose()?;
            let had_default = parameters
                .last()
                .is_some_and(|(_, default): &(_, Option<_>)| default.is_some());
            if had_default && default.is_none() {
                return Err(syntax(
                    "a parameter without a default follows one with it",
                    self.line(),
                ));
            }
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    /// What is assigned to: a name, several, or an attribute of a namespace.
    fn target(&mut self, with_attribute: bool) -> Result<Target> {
        let first = self.one_target(with_attribute)?;
        if *self.peek() != Token::Operator(",") {
            return Ok(first);
        }
        let mut targets = vec![first];
        while self.skip_operator(",") {
            if matches!(self.peek(), Token::Operator("=") | Token::BlockEnd) {
                break;
            }
            targets.push(self.one_target(with_attribute)?);
        }
        Ok(Target::Tuple(targets))
    }

    fn one_target(&mut self, with_attribute: bool) -> Result<Target> {
        if self.skip_operator("(") {
            let target = self.nest(|parser| parser.target(with_attribute))?;
            self.expect_operator(")")?;
            return Ok(match target {
                tuple @ Target::Tuple(_) => tuple,
                one => one,
            });
        }
        let line = self.line();
        let name = self.name()?;
        if with_attribute && self.skip_operator(".") {
            return Ok(Target::Attribute(name, self.name()?));
        }
        if ["true", "false", "none", "True", "False", "None"].contains(&name.as_str()) {
            return Err(syntax(format!("`{name}` cannot be assigned to"), line));
        }
        Ok(Target::Name(name))
    }

    fn nest<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            return Err(syntax(
                format!("it is nested more than {MAX_NESTING} levels deep"),
                self.line(),
            ));
        }
        meter::descend()?;
        let result = parse(self);
        self.nesting -= 1;
        result
    }

    fn check_chain(&self, length: usize) -> Result<()> {
        if length > MAX_CHAIN {
            return Err(syntax(
                format!("an expression has more than {MAX_CHAIN} operators in a row"),
                self.line(),
            ));
        }
        Ok(())
    }
}
