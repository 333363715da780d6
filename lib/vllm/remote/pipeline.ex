defmodule VLLM.Remote.Pipeline do
  @moduledoc false
  # The caller's end of a VLLM.Streaming.Pipeline that runs on the engine's node. That asks for one
  # prompt after another while there is room, and gives one answer whenever the caller wants the
  # next: so no more is taken from the prompts, and no more is computed, than beside the engine.

  alias VLLM.Bridge.{Connection, Inbox}
  alias VLLM.Engine.Call
  alias VLLM.Error
  alias VLLM.Remote
  alias VLLM.Streaming.Pipeline

  @doc "See `Pipeline.run/3`; the requests are of `method`."
  @spec run(node(), term(), String.t(), Enumerable.t(), Pipeline.job()) :: Enumerable.t()
  def run(node, engine, method, prompts, job) do
    Inbox.stream(fn inbox ->
      open = fn -> Remote.Call.open(node, engine, {:pipeline, method}, job.call, inbox) end
      job = Map.merge(job, %{open: open, inbox: inbox})

      Stream.resource(
        fn ->
          %{
            remote: nil,
            input: Pipeline.input(prompts),
            # How many prompts were taken, and those that are to be sent once more.
            next: 0,
            again: [],
            # What was sent to this proxy, by its own count: index, params, and whether once more.
            sent: %{},
            count: 0
          }
        end,
        &step(&1, job),
        fn state ->
          if state.remote, do: Remote.Call.leave(state.remote, Connection.aborted())
          if state.input, do: state.input.({:halt, :none})
        end
      )
    end)
  end

  defp step(%{remote: nil, input: nil, again: []} = state, _job), do: {:halt, state}

  # A step of its own: where a prompt raises in the next one, the call is known, and left.
  defp step(%{remote: nil} = state, job),
    do: {[], %{state | remote: job.open.(), sent: %{}, count: 0}}

  defp step(state, job) do
    Remote.Call.tell(state.remote, :next)
    await(state, job)
  end

  # Whatever was sent is to be answered within its time, which began before this wait.
  defp await(%{remote: %{address: {_, ref}} = remote} = state, job) do
    case Inbox.next(job.inbox, Remote.Call.patience(Call.begin(job.call).deadline)) do
      {^ref, :want} ->
        state |> send_next(job) |> await(job)

      {^ref, {:element, {count, answer}}} ->
        {{index, _params, _again?}, sent} = Map.pop!(state.sent, count)
        {[{index, done(answer, job)}], %{state | sent: sent}}

      {^ref, {:answer, :ok}} ->
        {:halt, state}

      # Of an earlier proxy.
      {other, _} when other != ref ->
        await(state, job)

      last ->
        {:error, error} = Remote.Call.last(remote, last)
        Remote.Call.leave(remote, error)
        lost(%{state | remote: nil}, error, job)
    end
  end

  defp done({:ok, value}, job), do: {:ok, job.result.(value)}
  defp done(error, _job), do: error

  defp send_next(state, job) do
    case take(state, job) do
      {nil, state} ->
        Remote.Call.tell(state.remote, :end)
        state

      {{_index, params, _again?} = one, state} ->
        Remote.Call.tell(state.remote, {:prompt, params})
        %{state | sent: Map.put(state.sent, state.count, one), count: state.count + 1}
    end
  end

  defp take(%{again: [one | again]} = state, _job), do: {one, %{state | again: again}}
  defp take(%{input: nil} = state, _job), do: {nil, state}

  defp take(%{next: index} = state, job) do
    case Pipeline.next(state.input) do
      {:prompt, prompt, input} ->
        {{index, job.request.(prompt), false}, %{state | input: input, next: index + 1}}

      :end ->
        {nil, %{state | input: nil}}
    end
  end

  # Everything that was under way ends with the error, or else the next prompt, so that there is an
  # end to them. A new proxy is tried for the others.
  defp lost(%{sent: sent} = state, error, job) when sent == %{} do
    case take(state, job) do
      {nil, state} -> {:halt, state}
      {{index, _params, _again?}, state} -> {[{index, {:error, error}}], state}
    end
  end

  defp lost(state, error, job) do
    {again, ended} =
      state.sent
      |> Map.values()
      |> Enum.sort()
      |> Enum.split_with(fn {_index, _params, again?} ->
        match?(%Error{reason: :node_down}, error) and job.call.retry and not again?
      end)

    again = for {index, params, _} <- again, do: {index, params, true}

    {for({index, _, _} <- ended, do: {index, {:error, error}}),
     %{state | again: again ++ state.again}}
  end
end
