defmodule VLLM.Puppet do
  @moduledoc """
  A worker program that does nothing of itself: it stands in for the port, as that of `VLLM.Test`
  does, tells the test what it is asked, and does what the test tells it.
  """

  alias VLLM.Bridge.{Frames, MessagePack, Program}

  @doc "For `start_program` of an engine's config; `test` gets `{:puppet, pid, what}`."
  def start(test) do
    owner = self()
    pid = spawn_link(fn -> loop(%{test: test, owner: owner, load: nil, held: %{}}) end)
    run_dir = Path.join(Program.base_dir(), Base.url_encode64(:rand.bytes(9)))
    {:ok, %Program{port: pid, os_pid: 0, run_dir: run_dir, python: ""}}
  end

  @doc "Has it load (`:ok` or a reason), answer a prompt, send garbage, or end."
  def tell(pid, what), do: send(pid, what)

  defp loop(state) do
    receive do
      {:frame, frame} ->
        {:ok, message} = frame |> IO.iodata_to_binary() |> MessagePack.decode()
        loop(receive_message(message, state))

      {:load, :ok} ->
        respond(state, state.load, nil, %{"max_num_seqs" => 8})
        loop(state)

      {:load, reason} ->
        respond(state, state.load, error(reason), nil)
        loop(state)

      {:answer, prompt} ->
        {id, held} = Map.pop!(state.held, prompt)
        respond(state, id, nil, output(prompt))
        loop(%{state | held: held})

      :garbage ->
        write(state, <<0xC1>>)
        loop(state)

      :exit ->
        exited(state)
    end
  end

  defp receive_message([0, id, "hello", _], state) do
    respond(state, id, nil, %{})
    state
  end

  defp receive_message([0, id, "load", _], state) do
    send(state.test, {:puppet, self(), :loading})
    %{state | load: id}
  end

  defp receive_message([0, id, "generate", %{"prompt" => prompt}], state) do
    send(state.test, {:puppet, self(), {:asked, prompt}})
    put_in(state.held[prompt], id)
  end

  # Tests beside it ask all engines of the node how they are.
  defp receive_message([0, id, _method, _], state) do
    respond(state, id, error("unsupported"), nil)
    state
  end

  defp receive_message([2, "cancel", %{"id" => id}], state) do
    case Enum.find(state.held, fn {_, held} -> held == id end) do
      {prompt, ^id} ->
        respond(state, id, error("aborted"), nil)
        %{state | held: Map.delete(state.held, prompt)}

      nil ->
        state
    end
  end

  defp receive_message([2, "shutdown", _], state), do: exited(state)
  defp receive_message([2, _, _], state), do: state

  defp exited(state) do
    send(state.owner, {self(), {:exit_status, 1}})
    exit(:normal)
  end

  defp respond(state, id, error, result) do
    write(state, MessagePack.encode!([1, id, error, result]))
  end

  defp write(state, frame) do
    send(state.owner, {self(), {:data, frame |> Frames.wrap() |> IO.iodata_to_binary()}})
  end

  defp error(reason), do: %{"reason" => reason, "message" => "So be it.", "details" => %{}}

  defp output(text) do
    completion = %{"index" => 0, "text" => text, "token_ids" => "", "finish_reason" => "stop"}
    %{"request_id" => "1", "prompt_token_ids" => "", "outputs" => [completion]}
  end
end
