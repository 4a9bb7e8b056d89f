//! Expressions, from the loosest operator to the tightest.

use super::super::ast::{Comparison, Expression, ExpressionKind, Operator, Step, UnaryOperator};
use super::super::failure::Result;
use super::super::lexer::{Token, syntax};
use super::super::value::Value;
use super::{MAX_NESTING, Parser};

impl Parser {
    /// Expressions with commas between them are a tuple.
    pub(super) fn tuple(&mut self, with_condition: bool) -> Result<Expression> {
        let line = self.line();
        let mut items = Vec::new();
        loop {
            if !items.is_empty() && self.ends_tuple() {
                break;
            }
            items.push(if with_condition {
                self.expression()?
            } else {
                self.nest(Self::or)?
            });
            if !self.skip_operator(",") {
                if items.len() == 1 {
                    return Ok(items.remove(0));
                }
                break;
            }
        }
        let kind = ExpressionKind::Tuple(items);
        Ok(Expression { line, kind })
    }

    fn ends_tuple(&self) -> bool {
        matches!(
            self.peek(),
            Token::VariableEnd | Token::BlockEnd | Token::Operator(")" | "]") | Token::End
        ) || self.is_name("recursive")
    }

    pub(super) fn expression(&mut self) -> Result<Expression> {
        self.nest(Self::conditional)
    }

    fn conditional(&mut self) -> Result<Expression> {
        let line = self.line();
        let mut then = self.or()?;
        let mut levels = 0;
        while self.skip_name("if") {
            levels += 1;
            if levels > MAX_NESTING {
                return Err(syntax("too many conditions in a row", line));
            }
            let test = Box::new(self.or()?);
            let otherwise = match self.skip_name("else") {
                true => Some(Box::new(self.expression()?)),
                false => None,
            };
            let kind = ExpressionKind::Conditional {
                test,
                then: Box::new(then),
                otherwise,
            };
            then = Expression { line, kind };
        }
        Ok(then)
    }

    fn or(&mut self) -> Result<Expression> {
        self.words("or", Self::and, ExpressionKind::Or)
    }

    fn and(&mut self) -> Result<Expression> {
        self.words("and", Self::not, ExpressionKind::And)
    }

    fn words(
        &mut self,
        word: &str,
        tighter: fn(&mut Self) -> Result<Expression>,
        kind: fn(Vec<Expression>) -> ExpressionKind,
    ) -> Result<Expression> {
        let line = self.line();
        let first = tighter(self)?;
        if !self.is_name(word) {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_name(word) {
            items.push(tighter(self)?);
            self.check_chain(items.len())?;
        }
        let kind = kind(items);
        Ok(Expression { line, kind })
    }

    fn not(&mut self) -> Result<Expression> {
        let line = self.line();
        let mut operators = Vec::new();
        while self.skip_name("not") {
            operators.push(UnaryOperator::Not);
            self.check_chain(operators.len())?;
        }
        let operand = self.compare()?;
        Ok(unary(operators, operand, line))
    }

    fn compare(&mut self) -> Result<Expression> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Token::Operator("==") => Comparison::Equal,
                Token::Operator("!=") => Comparison::NotEqual,
                Token::Operator("<") => Comparison::Less,
                Token::Operator("<=") => Comparison::LessOrEqual,
                Token::Operator(">") => Comparison::Greater,
                Token::Operator(">=") => Comparison::GreaterOrEqual,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name) if name == "not" && self.second_is("in") => {
                    self.at += 1;
                    Comparison::NotIn
                }
                _ => break,
            };
            self.at += 1;
            rest.push((comparison, self.sum()?));
            self.check_chain(rest.len())?;
        }
        if rest.is_empty() {
            return Ok(first);
        }
        let first = Box::new(first);
        let kind = ExpressionKind::Compare { first, rest };
        Ok(Expression { line, kind })
    }

    fn second_is(&self, name: &str) -> bool {
        let second = self.tokens.get(self.at + 1);
        matches!(second.map(|located| &located.token), Some(Token::Name(found)) if found == name)
    }

    fn sum(&mut self) -> Result<Expression> {
        self.arithmetic(Self::concat, |token| match token {
            Token::Operator("+") => Some(Operator::Add),
            Token::Operator("-") => Some(Operator::Subtract),
            _ => None,
        })
    }

    fn product(&mut self) -> Result<Expression> {
        self.arithmetic(Self::power, |token| match token {
            Token::Operator("*") => Some(Operator::Multiply),
            Token::Operator("/") => Some(Operator::Divide),
            Token::Operator("//") => Some(Operator::FloorDivide),
            Token::Operator("%") => Some(Operator::Modulo),
            _ => None,
        })
    }

    fn power(&mut self) -> Result<Expression> {
        self.arithmetic(
            |parser| parser.unary(true),
            |token| (*token == Token::Operator("**")).then_some(Operator::Power),
        )
    }

    fn arithmetic(
        &mut self,
        tighter: fn(&mut Self) -> Result<Expression>,
        operator_of: fn(&Token) -> Option<Operator>,
    ) -> Result<Expression> {
        let line = self.line();
        let first = tighter(self)?;
        let mut rest = Vec::new();
        while let Some(operator) = operator_of(self.peek()) {
            self.at += 1;
            rest.push((operator, tighter(self)?));
            self.check_chain(rest.len())?;
        }
        if rest.is_empty() {
            return Ok(first);
        }
        let first = Box::new(first);
        let kind = ExpressionKind::Arithmetic { first, rest };
        Ok(Expression { line, kind })
    }

    fn concat(&mut self) -> Result<Expression> {
        let line = self.line();
        let first = self.product()?;
        if *self.peek() != Token::Operator("~") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_operator("~") {
            items.push(self.product()?);
            self.check_chain(items.len())?;
        }
        let kind = ExpressionKind::Concat(items);
        Ok(Expression { line, kind })
    }

    /// Signs bind tighter than filters: `-1 | abs` is 1.
    fn unary(&mut self, with_filters: bool) -> Result<Expression> {
        let line = self.line();
        let mut operators = Vec::new();
        loop {
            if self.skip_operator("-") {
                operators.push(UnaryOperator::Minus);
            } else if self.skip_operator("+") {
                operators.push(UnaryOperator::Plus);
            } else {
                break;
            }
            self.check_chain(operators.len())?;
        }
        let mut operand = self.primary()?;
        if !operators.is_empty() {
            let steps = self.steps(false)?;
            operand = unary(operators, postfix(operand, steps), line);
        }
        let steps = self.steps(with_filters)?;
        Ok(postfix(operand, steps))
    }

    pub(super) fn primary(&mut self) -> Result<Expression> {
        let line = self.line();
        let kind = match self.next() {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => ExpressionKind::Constant(Value::Bool(true)),
                "false" | "False" => ExpressionKind::Constant(Value::Bool(false)),
                "none" | "None" => ExpressionKind::Constant(Value::None),
                _ => ExpressionKind::Name(name),
            },
            Token::Text(mut text) => {
                while let Token::Text(more) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                ExpressionKind::Constant(Value::text(text))
            }
            Token::Integer(value) => ExpressionKind::Constant(Value::Int(value)),
            Token::Float(value) => ExpressionKind::Constant(Value::Float(value)),
            Token::Operator("(") => {
                if self.skip_operator(")") {
                    ExpressionKind::Tuple(Vec::new())
                } else {
                    let inside = self.tuple(true)?;
                    self.expect_operator(")")?;
                    return Ok(inside);
                }
            }
            Token::Operator("[") => ExpressionKind::List(self.list()?),
            Token::Operator("{") => ExpressionKind::Dict(self.dict()?),
            found => {
                self.at -= 1;
                return Err(self.unexpected(&found, "a value"));
            }
        };
        Ok(Expression { line, kind })
    }

    fn list(&mut self) -> Result<Vec<Expression>> {
        let mut items = Vec::new();
        while !self.skip_operator("]") {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator("]") {
                    break;
                }
            }
            items.push(self.expression()?);
        }
        Ok(items)
    }

    fn dict(&mut self) -> Result<Vec<(Expression, Expression)>> {
        let mut pairs = Vec::new();
        while !self.skip_operator("}") {
            if !pairs.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.expect_operator(":")?;
            pairs.push((key, self.expression()?));
        }
        Ok(pairs)
    }
}

fn unary(operators: Vec<UnaryOperator>, operand: Expression, line: usize) -> Expression {
    if operators.is_empty() {
        return operand;
    }
    let operand = Box::new(operand);
    let kind = ExpressionKind::Unary { operators, operand };
    Expression { line, kind }
}

pub(super) fn postfix(base: Expression, steps: Vec<Step>) -> Expression {
    if steps.is_empty() {
        return base;
    }
    let line = base.line;
    let base = Box::new(base);
    let kind = ExpressionKind::Postfix { base, steps };
    Expression { line, kind }
}
