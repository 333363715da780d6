defmodule Mix.Vllm.Answer do
  @moduledoc false
  # What a task does with the answer to its question.

  alias VLLM.{Error, JSON, Terminal}

  @doc "What was answered; an error is printed, and the task ends with status 1."
  @spec ok!({:ok, answer} | {:error, Error.t()}) :: answer when answer: term()
  def ok!({:ok, answer}), do: answer

  def ok!({:error, error}) do
    Mix.shell().error(error.message)
    exit({:shutdown, 1})
  end

  @doc "What `ask` is answered, which imports vLLM; it is said so while one waits, but for `--json`."
  @spec of_vllm!([String.t()], (() -> {:ok, answer} | {:error, Error.t()})) :: answer
        when answer: term()
  def of_vllm!(flags, ask) do
    shown? = if "json" in flags, do: false
    shown? |> Terminal.waiting("vLLM is asked, which may take half a minute …", ask) |> ok!()
  end

  @doc "Prints an answer by `print`, or with `--json` all of it as JSON."
  @spec print(answer, [String.t()], (answer -> term())) :: :ok when answer: term()
  def print(answer, flags, print) do
    if "json" in flags, do: Mix.shell().info(JSON.encode(answer)), else: print.(answer)
    :ok
  end
end
