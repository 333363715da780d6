defmodule VLLM.Streaming.Pipeline do
  @moduledoc false
  # Many prompts, each answered as soon as it can be, as a lazy enumerable.

  alias VLLM.Bridge.Inbox
  alias VLLM.Engine.{Call, Router}
  alias VLLM.Error

  @typedoc """
  What is asked of the engine: a request for each prompt, whose params `request` makes; `result`
  makes of its answer what is given out. The times of `call` are each prompt's own.
  """
  @type job :: %{
          request: (term() -> {:ok, map()} | {:error, Error.t()}),
          result: (map() -> term()),
          call: Call.t()
        }

  @doc """
  A lazy enumerable of `{index, {:ok, result} | {:error, error}}` for `prompts`,
  which may be endless: no more of them are taken than are under way. `new` makes what they are under
  way in.
  """
  @spec run((Inbox.t() -> Router.in_flight()), Enumerable.t(), job()) :: Enumerable.t()
  def run(new, prompts, job) do
    Inbox.stream(fn inbox ->
      Stream.resource(
        # The params and the index of the prompt that waits to be sent, and the index of the next.
        fn -> %{input: input(prompts), waiting: nil, next: 0, in_flight: new.(inbox)} end,
        &step(&1, job),
        fn %{in_flight: %via{}} = state ->
          via.cancel(state.in_flight)
          if state.input, do: state.input.({:halt, :none})
        end
      )
    end)
  end

  @typedoc "What is left of an enumerable that is taken from one by one; nil where nothing is."
  @type input :: (Enumerable.acc() -> Enumerable.result()) | nil

  @doc "Prompts, for `next/1`. Whoever leaves some of them gives it `{:halt, :none}`."
  @spec input(Enumerable.t()) :: input()
  def input(prompts),
    do: &Enumerable.reduce(prompts, &1, fn prompt, _ -> {:suspend, {:prompt, prompt}} end)

  @doc "The next prompt, and what is left then."
  @spec next(input()) :: {:prompt, term(), input()} | :end
  def next(input) do
    case input.({:cont, :none}) do
      {:suspended, {:prompt, prompt}, rest} -> {:prompt, prompt, rest}
      # A source may end with its last element, or after it.
      {_ended, {:prompt, prompt}} -> {:prompt, prompt, nil}
      {_ended, :none} -> :end
    end
  end

  # Each step sends one prompt while there is room, and otherwise waits for one answer.
  defp step(%{waiting: nil, input: nil, in_flight: %via{}} = state, job) do
    if via.count(state.in_flight) == 0, do: {:halt, state}, else: collect(state, job)
  end

  defp step(%{waiting: nil, input: input} = state, job) do
    case next(input) do
      {:prompt, prompt, rest} -> take(prompt, %{state | input: rest}, job)
      :end -> {[], %{state | input: nil}}
    end
  end

  defp step(%{waiting: {params, index}, in_flight: %via{} = in_flight} = state, job) do
    none? = via.count(in_flight) == 0
    call = Call.begin(job.call)

    case via.submit(in_flight, index, params, call, :once) do
      {:ok, in_flight} ->
        {[], %{state | waiting: nil, in_flight: in_flight}}

      :none_ready when none? ->
        case via.await_ready(in_flight, call) do
          :ok -> {[], state}
          {:error, error} -> {[{index, {:error, error}}], %{state | waiting: nil}}
        end

      {:error, %Error{} = error} when error.reason != :overloaded or none? ->
        {[{index, {:error, error}}], %{state | waiting: nil}}

      _full ->
        collect(state, job)
    end
  end

  defp take(prompt, %{next: index} = state, job) do
    state = %{state | next: index + 1}

    case job.request.(prompt) do
      {:ok, params} -> {[], %{state | waiting: {params, index}}}
      {:error, error} -> {[{index, {:error, error}}], state}
    end
  end

  defp collect(%{in_flight: %via{}} = state, job) do
    {index, answer, in_flight} = via.next(state.in_flight, :infinity)
    answer = with {:ok, value} <- answer, do: {:ok, job.result.(value)}
    {[{index, answer}], %{state | in_flight: in_flight}}
  end
end
