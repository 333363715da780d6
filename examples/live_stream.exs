# A process in the shape of a Phoenix LiveView that shows an answer as it is written. In a LiveView
# the state is the socket's assigns, `ask` and `stop` are events, and rendering is done for you.
#
#     iex -S mix
#     iex> c "examples/live_stream.exs"
#     iex> llm = VLLM.llm!("priv/models/demo", max_model_len: 1024)
#     iex> {:ok, view} = LiveStream.start_link(llm, self())
#     iex> LiveStream.ask(view, "The capital of France is")
#     iex> flush()
#
# A page that is closed ends its process, and with that the request in vLLM: nothing is to be done
# for it. What counts is that the engine is not this process's own. It belongs to the application:
#
#     children = [{VLLM, name: MyApp.LLM, model: "…"}, MyAppWeb.Endpoint]

defmodule LiveStream do
  use GenServer

  @doc """
  Shows a page to `browser`, a process that gets `{:rendered, page}` with each change. `options` are
  those of the streams.
  """
  def start_link(engine, browser, options \\ [max_tokens: 200]) do
    GenServer.start_link(__MODULE__, {engine, browser, options})
  end

  @doc "The user asks something; an answer that is under way is given up."
  def ask(view, question), do: GenServer.cast(view, {:ask, question})

  @doc "The user has read enough."
  def stop(view), do: GenServer.cast(view, :stop)

  @impl true
  def init({engine, browser, options}) do
    view = %{engine: engine, browser: browser, options: options}
    {:ok, Map.merge(view, %{stream: nil, answer: "", note: nil})}
  end

  @impl true
  def handle_cast({:ask, question}, view) do
    view = give_up(view)
    stream = VLLM.stream_to(view.engine, question, self(), view.options)
    {:noreply, render(%{view | stream: stream, answer: "", note: "writing"})}
  end

  def handle_cast(:stop, view), do: {:noreply, render(%{give_up(view) | note: "stopped"})}

  @impl true
  def handle_info({:vllm, stream, %VLLM.Delta{text: text}}, %{stream: stream} = view) do
    {:noreply, render(%{view | answer: view.answer <> text})}
  end

  def handle_info({:vllm, stream, {:done, output}}, %{stream: stream} = view) do
    tokens = VLLM.usage(output).completion_tokens
    {:noreply, render(%{view | stream: nil, note: "#{tokens} tokens"})}
  end

  def handle_info({:vllm, stream, {:error, error}}, %{stream: stream} = view) do
    {:noreply, render(%{view | stream: nil, note: Exception.message(error)})}
  end

  defp give_up(%{stream: nil} = view), do: view

  defp give_up(view) do
    # After this no message of the stream comes any more.
    :ok = VLLM.cancel(view.stream)
    %{view | stream: nil}
  end

  defp render(view) do
    send(view.browser, {:rendered, "#{view.answer} (#{view.note})"})
    view
  end
end
