defmodule VLLM.Remote.Proxy do
  @moduledoc false
  # Stands for a caller of another node on the engine's: one process for each call, which asks the
  # engine as any process of this node does. It ends with the call (see VLLM.Remote.Courier), and
  # what it has in flight then is aborted, as at the death of any caller.
  #
  # All that comes from the caller is data, and of the library's own making: messages for the inbox
  # whose reference both sides use, from `:caller`.

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Engine.{Call, InFlight, Operations, Router, Table}
  alias VLLM.Remote.{Ferry, Protocol}
  alias VLLM.Streaming.{Forwarded, Mailbox, Pipeline}

  @protocol Protocol.number()

  # How long an answer may be on its way, in ms: to a caller, and to one who waits for it no longer than
  # his deadline.
  @linger 60_000
  @soon 1_000

  @typedoc "What a caller says of itself, in every version: how it speaks, and where answers come to."
  @type hello :: %{protocol: pos_integer(), version: String.t(), address: Inbox.address()}

  @doc "The hello of a caller of this version."
  @spec hello(Inbox.address()) :: hello()
  def hello(address), do: Map.put(Protocol.versions(), :address, address)

  @doc "What the courier of a caller starts on this node."
  @spec serve(hello()) :: no_return()
  def serve(%{protocol: @protocol, address: {inbox, _} = address}) do
    # What is logged on the way is of this node.
    Process.group_leader(self(), Process.whereis(:init))
    {:caller, {engine, request, call}} = Inbox.next(inbox, :infinity)
    serve(request, engine, Call.arrive(call), address)
    # No normal end: it takes the courier along.
    exit(:shutdown)
  end

  def serve(%{address: address}) do
    Inbox.send(address, {:incompatible, Protocol.versions()})
    exit(:shutdown)
  end

  defp serve({:run, operation}, engine, call, address),
    do: answer(address, Operations.run(engine, operation, call))

  defp serve({:stream, method, params}, engine, call, address) do
    send = &Router.open(&1, :stream, params, call, &2)
    serve_one(engine, method, :many, call, address, send)
  end

  # For a VLLM.Cluster.InFlight, which has other engines to ask where this one takes nothing now.
  defp serve({:try, method, params, answers}, engine, call, address) do
    send = &InFlight.submit(&1, :stream, params, call, &2)
    serve_one(engine, method, answers, call, address, send)
  end

  # Prompts are fetched and results given one by one, when the caller asks for the next.
  defp serve({:pipeline, method}, engine, call, {inbox, _} = address) do
    with {:ok, table, _pid} <- Table.lookup(engine) do
      prompts =
        Stream.repeatedly(fn ->
          Inbox.send(address, :want)
          hear(inbox)
        end)
        |> Stream.take_while(&(&1 != :end))
        |> Stream.map(fn {:prompt, prompt} -> prompt end)

      # The caller makes the params and reads the answers.
      job = %{request: & &1, result: & &1, call: call}
      new = &InFlight.new(table, method, &1)
      :next = hear(inbox)

      Enum.each(Pipeline.run(new, prompts, job), fn answered ->
        Inbox.send(address, {:element, answered})
        :next = hear(inbox)
      end)

      answer(address, :ok)
    else
      {:error, error} -> answer(address, {:error, error})
    end
  end

  # For a VLLM.Remote.Gauge, which ends it.
  defp serve(:gauge, receiver, _call, address), do: gauge(receiver, address)

  defp serve({:cancel, ref}, caller, _call, address),
    do: answer(address, Forwarded.cancel(ref, caller))

  defp serve_one(engine, method, answers, call, {inbox, _} = address, send) do
    with {:ok, table, _pid} <- Table.lookup(engine),
         answers = way(answers, address),
         {:ok, in_flight} <- send.(InFlight.new(table, method, inbox), answers) do
      follow(in_flight, call, address, answers)
    else
      refused -> answer(address, refused)
    end
  end

  # The deltas of a stream go by the ferry, as many as the caller has granted; of the first it tells
  # here.
  defp way(:many, address), do: Ferry.take(address)
  defp way(:once, _address), do: :once

  # What the caller of a pipeline says next. Where it leaves, the pipeline gives up what is in flight
  # on the way out.
  defp hear(inbox) do
    case Inbox.next(inbox, :infinity) do
      {:caller, {:leave, _error}} -> exit(:shutdown)
      {:caller, said} -> said
    end
  end

  @spec gauge(pid(), Inbox.address()) :: no_return()
  defp gauge(receiver, {inbox, _} = address) do
    {:caller, :look} = Inbox.next(inbox, :infinity)
    await_room(receiver)
    Inbox.send(address, :room)
    gauge(receiver, address)
  end

  defp await_room(receiver) do
    if Mailbox.busy?(receiver) do
      Process.sleep(Mailbox.look_again())
      await_room(receiver)
    end
  end

  defp follow(in_flight, call, {inbox, _} = address, answers) do
    case Inbox.next(inbox, Deadline.remaining(call.deadline)) do
      {:caller, {:grant, count}} ->
        InFlight.grant(in_flight, :stream, count)
        follow(in_flight, call, address, answers)

      {:caller, {:leave, error}} ->
        InFlight.cancel(in_flight, error)

      # The caller waits a little longer than this side, for what it says. That he leaves may have
      # been dropped with the rest.
      :timeout ->
        error = Connection.timeout()
        InFlight.cancel(in_flight, error)
        finish(answers, {:error, error}, address, @soon)

      message ->
        case InFlight.handle(in_flight, message) do
          {:none, in_flight} ->
            follow(in_flight, call, address, answers)

          {:stream, delta, in_flight} when elem(delta, 0) == :delta ->
            follow(in_flight, call, address, answers)

          {:stream, last, _in_flight} ->
            finish(answers, last, address, @linger)
        end
    end
  end

  defp finish(:once, answer, address, _patience), do: answer(address, answer)

  # The courier would end with this process, and its end might come before what the ferry brings. So
  # the caller ends both, once he has seen it; one who does not look is not waited for for ever.
  defp finish(relay, answer, {inbox, _}, patience) do
    Ferry.answer(relay, {:answer, answer})
    await_leave(inbox, Deadline.new(patience))
  end

  defp await_leave(inbox, deadline) do
    case Inbox.next(inbox, Deadline.remaining(deadline)) do
      {:caller, {:leave, _error}} -> :ok
      :timeout -> :ok
      _late -> await_leave(inbox, deadline)
    end
  end

  defp answer(address, answer), do: Inbox.send(address, {:answer, answer})
end
